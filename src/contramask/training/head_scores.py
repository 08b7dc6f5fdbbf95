"""Hits and losses of many heads on images held out, over all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from contramask import distributed
from contramask.probes.linear import LinearProbe
from contramask.types import UserError, fold


def held_out(key: str, fraction: float, *, seed: int) -> bool:
    """Whether an image is of the part held out: a function of its name and the seed alone."""
    return fold(seed, "held out", key) < fraction * 2**63


@dataclass(frozen=True)
class Table:
    """What heads reached over all ranks, those of the first feature first."""

    hits: Float[Tensor, "2 H"]  # images whose class is the first, among the first five
    loss: Float[Tensor, " H"]
    images: int

    def accuracy(self, head: int) -> tuple[float, float]:
        """Fractions of images: top-1, top-5."""
        one, five = (self.hits[:, head] / self.images).tolist()
        return round(one, 6), round(five, 6)

    def best(self) -> int:
        """The head of the most hits; of equal ones that of least loss. A diverged one never is.

        Raises:
            UserError: all have diverged.
        """
        kept = self.loss.isfinite().nonzero().flatten().tolist()
        if not kept:
            raise UserError(
                f"linear probe: all {len(self.loss)} heads diverged; check that the features are "
                "finite, or set smaller recipe.rates"
            )
        hits, loss = self.hits[0].tolist(), self.loss.tolist()
        return max(kept, key=lambda head: (hits[head], -loss[head]))


class HeadScores:
    """Sums of this rank, batch by batch."""

    def __init__(self, heads: Sequence[LinearProbe]):
        self.heads, self.images = heads, 0
        self.sums: list[Float[Tensor, "3 H"]] = []

    def add(self, features: Sequence[Float[Tensor, "B _"]], y: Int[Tensor, " B"]) -> None:
        """One batch: the feature of each group of heads, and its labels."""
        tops = (1, min(5, self.heads[0].weight.shape[2]))
        rows = []
        for probe, x in zip(self.heads, features, strict=True):
            hits, loss = probe.tally(x, y, tops=tops)
            rows.append(torch.cat([hits, loss[None]]))
        self.sums.append(torch.cat(rows, dim=1))
        self.images += len(y)

    def table(self, device: torch.device) -> Table:
        """Over all ranks, each of which must ask.

        Raises:
            UserError: there was no labelled image.
        """
        number = sum(len(probe.rates) for probe in self.heads)
        nothing = torch.zeros((3, number), device=device)
        sums = distributed.total(torch.stack([nothing, *self.sums]).sum(0))
        images = int(distributed.total(torch.tensor(self.images, device=device)))
        if images == 0:
            raise UserError(
                "linear probe: no labelled image to score; check `cls` in the shards, and that "
                "recipe.holdout leaves images to choose on"
            )
        return Table(sums[:2], sums[2], images)
