"""What an analysis is: it says what it reads of a forward pass, shrinks it at once, and adds up.

A `torchmetrics.Metric`, so its sums are gathered over ranks; the same object serves the callback
during training and the command over checkpoints.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torchmetrics
from jaxtyping import Float, Int
from torch import Tensor

from contramask.analysis.reading import Reading
from contramask.distributed import world
from contramask.functional.moments import Moments
from contramask.types import Spec, UserError

# What a tap reads: what modules give or are given, the attention of blocks, or the final tokens.
Kind = Literal["output", "input", "attention", "tokens"]

# The two-sided 95 % interval of bootstrap replicates.
INTERVAL = (0.025, 0.975)


class Tap(NamedTuple):
    """Reads every module that matches a pattern, and shrinks what it read at once.

    `reduce(value, label)` gets a tensor, an `Attended` (kind `attention`) or `Tokens` (kind
    `tokens`) and gives a tensor whose first axis is images or minibatches. Nothing else is kept.
    """

    kind: Kind
    pattern: str  # shell-like, of `Backbone.sites()`, e.g. "blocks.*.norm1"; of blocks: "*"
    reduce: Callable[[Any, str], Tensor]
    view: str = "plain"  # of the images, see `views.VIEWS`


class Seen(NamedTuple):
    """What one batch gave."""

    found: Mapping[str, Mapping[str, Tensor]]  # tap -> layer -> what `reduce` gave, in depth order
    label: Int[Tensor, " B"]  # -1 where unknown
    weights: Float[Tensor, "B R"]  # of each image in the sample (column 0) and its replicates
    spec: Spec
    images: Float[Tensor, "B 3 H W"]  # normalised
    keys: tuple[str, ...]  # the samples' names


def _others() -> bool:
    return world() > 1


class Result:
    """Readings, closed to torchmetrics, which would squeeze tensors in lists and dataclasses."""

    def __init__(self, readings: list[Reading]):
        self.readings = readings


class Analysis(torchmetrics.Metric, ABC):
    """A statistic of activations.

    Attributes:
        images: the most images it wants, over all ranks; None: all there are.
        replicates: bootstrap samples of images its intervals come from; 0: no intervals.
    """

    full_state_update = False
    images: int | None = None

    def __init__(self, *, replicates: int = 0):
        # Asked when it computes: a rank that is `alone` waits for nobody.
        super().__init__(distributed_available_fn=_others)
        self.replicates = replicates
        self.layers: dict[str, tuple[str, ...]] = {}  # tap -> layers, known after the first batch
        self._found_late: set[str] = set()

    @abstractmethod
    def taps(self, spec: Spec) -> Mapping[str, Tap]:
        """What to read of a backbone of these sizes, by a name of the analysis's own.

        Raises:
            UserError: if it cannot be read of such a backbone.
        """

    @abstractmethod
    def update(self, seen: Seen) -> None:
        """Add one batch."""

    @abstractmethod
    def readings(self) -> list[Reading]:
        """What was found, from the states; called by `compute` when ranks have added theirs up."""

    def compute(self) -> "Result":
        """What was found. The same on every rank."""
        return Result(self.readings())

    def add_sum(self, name: str, zeros: Tensor) -> None:
        """A state that is added up over batches and ranks; it is gone after `reset`."""
        self.add_state(name, zeros, dist_reduce_fx="sum")
        self._found_late.add(name)

    def reset(self) -> None:
        """Forget all, sizes too: the next images may be another backbone's."""
        super().reset()
        for name in self._found_late:
            for table in (self._defaults, self._reductions, self._persistent):
                del table[name]
            delattr(self, name)
        self._found_late.clear()
        self.layers.clear()

    # ---- means over images, with replicates ----

    def add_means(self, name: str, values: Float[Tensor, "B ..."], weights: Tensor) -> None:
        """Add images to the mean of this name; its shape is known from the first batch on."""
        if name not in self._defaults:
            shape = (weights.shape[1], *values.shape[1:])
            for part, size in ((name, shape), (f"{name}_count", shape[:1])):
                self.add_sum(part, torch.zeros(size, dtype=torch.float64, device=values.device))
        total, count = getattr(self, name), getattr(self, f"{name}_count")
        w = weights.to(total)
        # A layer with NaN stays one: 0 * NaN of an image that a replicate lacks is NaN as well.
        total += torch.einsum("br,b...->r...", w, values.to(total))
        count += w.sum(0)

    # ---- moments ----

    def add_moments(self, name: str, new: Moments) -> None:
        """Merge moments into those of this name."""
        parts = {"count": new.count, "mean": new.mean, "scatter": new.scatter}
        if f"{name}_count" not in self._defaults:
            for part, value in parts.items():
                # None: `compute` finds the parts of the ranks stacked, for `moments` to merge.
                self.add_state(f"{name}_{part}", torch.zeros_like(value), dist_reduce_fx=None)
                self._found_late.add(f"{name}_{part}")
        merged = Moments(*(getattr(self, f"{name}_{part}") for part in parts)) + new
        for part in parts:
            setattr(self, f"{name}_{part}", getattr(merged, part))

    def moments(self, name: str) -> Moments:
        """The moments of this name, of all ranks."""
        parts: list[Any] = [getattr(self, f"{name}_{p}") for p in ("count", "mean", "scatter")]
        if parts[0].ndim == 0:
            return Moments(*parts)
        ranks = [Moments(*part) for part in zip(*parts, strict=True)]
        return sum(ranks[1:], ranks[0])

    def stacked(self, seen: Seen, tap: str) -> Tensor:
        """What a tap found, (B, layers, ...); remembers the layers."""
        found = seen.found[tap]
        self.layers[tap] = tuple(found)
        return torch.stack(list(found.values()), 1)

    def means(self, name: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The mean of this name and the ends of its interval."""
        total, count = getattr(self, name), getattr(self, f"{name}_count")
        table = total / count.clamp(min=1e-12).view(-1, *[1] * (total.ndim - 1))
        return interval(table)


def interval(table: Float[Tensor, "R ..."]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The estimate, which is entry 0, and the ends of the interval of the others, if any."""
    if len(table) == 1:
        return table[0], None, None
    ends = torch.quantile(table[1:].nan_to_num(0.0), table.new_tensor(INTERVAL), dim=0)
    return table[0], ends[0], ends[1]


def share(images: int | None, rank: int, ranks: int) -> float:
    """How many of so many images over all ranks are this rank's."""
    if images is not None and images < 1:
        raise UserError(f"analysis: images is {images}; allowed is at least 1; set images")
    return math.inf if images is None else float(len(range(rank, images, ranks)))
