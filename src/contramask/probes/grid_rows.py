"""Which rows a probe reads: shares of the labels, and features wherever they fit."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from contramask.probes.features import Feature
from contramask.probes.store import StoredFeatures, StoredRows
from contramask.types import UserError, fold

# Features that take more than this are read from the disk batch by batch.
MEMORY = 8 << 30


@dataclass(frozen=True)
class Share:
    """How many of the labels of train are used; of each class the same part, so classes stay even.

    The images are those of `contramask.data.subset` for the same seed, so a probe and a fine-tuning
    of 1 % of the labels have the same images: both take the first of one order of their names.

    Attributes:
        fraction: of the rows of each class, rounded, at least one (SimCLR: 0.01 and 0.1).
        per_class: or so many rows of each class.

    Raises:
        UserError: for no share at all.
    """

    fraction: float = 1.0
    per_class: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UserError(
                f"linear probe: a fraction of the labels is {self.fraction}; allowed is a number "
                "in (0, 1]; set --fractions"
            )
        if self.per_class is not None and self.per_class < 1:
            raise UserError(
                f"linear probe: {self.per_class} labels per class; allowed is 1 or more; set "
                "--per_class"
            )

    def __str__(self) -> str:
        if self.per_class is not None:
            return f"{self.per_class} per class"
        return f"{100 * self.fraction:g}%"

    def of(self, y: Int[Tensor, " N"], keys: list[str], seed: int) -> Int[Tensor, " n"]:
        """The rows, in rising order; those of a smaller share are among those of a larger one.

        Args:
            y: labels.
            keys: the samples' names.
            seed: of the choice.

        Raises:
            UserError: a class has fewer rows than `per_class`.
        """
        if self.per_class is None and self.fraction == 1:
            return torch.arange(len(y))
        kept: list[int] = []
        for label in y.unique().tolist():
            rows = (y == label).nonzero()[:, 0].tolist()
            count = self.per_class or max(1, math.floor(len(rows) * self.fraction + 0.5))
            if count > len(rows):
                raise UserError(
                    f"linear probe: {count} labels per class are wanted, class {label} has "
                    f"{len(rows)} images of train; set --per_class to at most that"
                )
            kept += sorted(rows, key=lambda row: fold(seed, "subset", keys[row]))[:count]
        return torch.tensor(kept, dtype=torch.long).sort().values


def resident(
    x: Mapping[Feature, Tensor], wanted: tuple[Feature, ...], device: torch.device
) -> dict[Feature, Tensor | StoredRows]:
    """Features on the device if they fill less than half of it, else in memory, else on the disk.

    What comes back is read by `rows[numbers]`.
    """
    bare = {f: x.rows(f) if isinstance(x, StoredFeatures) else x[f] for f in wanted}
    size = sum(4 * math.prod(rows.shape) for rows in bare.values())
    if device.type == "cuda" and 2 * size < torch.cuda.mem_get_info(device)[0]:
        return {f: x[f].to(device) for f in wanted}
    return dict(bare) if size > MEMORY else {f: x[f] for f in wanted}
