"""The settings of streaming, in one place."""

from dataclasses import dataclass
from typing import Literal

from contramask.data.faults import Faults
from contramask.errors import UserError


@dataclass(frozen=True)
class Streaming:
    """How shards are read. The order of the training stream depends on the first three alone.

    Attributes:
        unit: samples that follow one another in one stream; divides the batch size of a rank.
            None: the batch size. With a smaller unit a batch mixes more streams, and the order
            stays the same when the batch size of a rank changes.
        streams: places of the epoch that are read at once, at most; fewer for small data sets.
        block: samples of a stream that are shuffled among each other. All workers of all ranks
            together hold up to `streams * block` compressed images, and the next blocks besides.
        max_bad: the fraction of bad samples above which reading stops. 0: at the first one.
        grace: bad samples that are let pass, by all workers of all ranks, before the fraction
            counts.
        prefetch: finished batches that each worker keeps ready.
        allow_pipe: whether `pipe:` addresses may run a shell command.
        index: an index file of all shards, where it cannot lie beside them.
        context: how workers are started; None: as Python does on this system.
    """

    unit: int | None = None
    streams: int = 32
    block: int = 1024
    max_bad: float = 0.01
    grace: int = 100
    prefetch: int = 2
    allow_pipe: bool = False
    index: str | None = None
    context: Literal["fork", "spawn", "forkserver"] | None = None

    def __post_init__(self) -> None:
        for name in ("unit", "streams", "block", "prefetch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"data.streaming.{name} is {value}; it is a number from 1 on")
        if not 0 <= self.max_bad < 1:
            raise UserError(
                f"data.streaming.max_bad is {self.max_bad}; it is a fraction in [0, 1), "
                "0 stops at the first bad sample"
            )

    def faults(self, readers: int) -> Faults:
        """Counts the bad samples of one of so many readers."""
        return Faults(max_bad=self.max_bad, grace=-(-self.grace // readers))

    def unit_of(self, batch: int) -> int:
        """The unit for a rank's batch of this size; `UserError` if it does not divide the batch."""
        unit = batch if self.unit is None else self.unit
        if batch % unit:
            raise UserError(
                f"data.streaming.unit is {unit}, which does not divide the batch of {batch} images "
                "a rank; choose a divisor, or change data.batch_size"
            )
        return unit
