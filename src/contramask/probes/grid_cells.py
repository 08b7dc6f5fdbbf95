"""What a grid of linear probes varies, and what becomes of each place of it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from contramask.probes.features import CLS, Feature
from contramask.probes.grid_heads import VectorNorm
from contramask.probes.grid_rows import Share
from contramask.probes.linear import LinearRecipe
from contramask.probes.store import Bank

Input = tuple[Feature, VectorNorm]
DEFAULT = LinearRecipe()


@dataclass(frozen=True)
class Axes:
    """What a grid varies.

    Attributes:
        features: where in depth, and how tokens become a vector.
        norms: of the vector, see `Heads`.
        shares: of the labels of train.
        recipe: how heads are trained, and the rates.
    """

    features: tuple[Feature, ...] = (CLS,)
    norms: tuple[VectorNorm, ...] = ("batch",)
    shares: tuple[Share, ...] = (Share(),)
    recipe: LinearRecipe = DEFAULT

    @property
    def inputs(self) -> list[Input]:
        """Every feature under every norm."""
        return [(f, n) for f in dict.fromkeys(self.features) for n in dict.fromkeys(self.norms)]


@dataclass(frozen=True)
class Cell:
    """One place of the grid, at its best rate.

    Attributes:
        feature, norm, share: where.
        rows: how many rows of train it was trained on.
        rate: the chosen one.
        edge: whether that is the smallest or largest of several.
        sweep: rate -> accuracy on the held-out rows, -1 where it diverged; empty where there was
            nothing to choose.
        loss: on the held-out rows, of the chosen rate.
        top1, top5: of val, once it is scored; top5 with more than five classes.
        images: how many val has.
    """

    feature: Feature
    norm: VectorNorm
    share: Share
    rows: int
    rate: float
    edge: bool
    sweep: Mapping[float, float]
    loss: float
    top1: float | None = None
    top5: float | None = None
    images: int = 0

    @property
    def held_out(self) -> float | None:
        """Accuracy on the held-out rows."""
        return self.sweep.get(self.rate)

    def protocol(self, recipe: LinearRecipe) -> str:
        """How it was trained, in one line; the words of `LinearProbe.protocol`."""
        r = replace(recipe, batch_norm=self.norm == "batch")
        layer = "layer norm of the vector, " if self.norm == "layer" else ""
        rate = f"learning rate {self.rate:g} x batch/256"
        if len(r.rates) > 1:
            edge = " (the edge of the grid)" if self.edge else ""
            rate += (
                f"{edge}, the best of {len(r.rates)} on {r.holdout:.0%} of train, "
                "then trained on all of it"
            )
        labels = "" if self.share == Share() else f" ({self.share} of the labels, stratified)"
        return (
            f"linear: {layer}{r.about()}, {rate}, {r.curve()}, {r.epochs} epochs of {self.rows} "
            f"train images{labels} in batches of {min(r.batch, self.rows)}, seed {r.seed}"
        )

    def row(self, recipe: LinearRecipe, transform: str) -> dict[str, Any]:
        """What a table says of it; `fraction` or `per_class` is None, whichever was not given.

        `transform` is what the clean view is, for the protocol.
        """
        few = self.share.per_class
        return {
            "source": self.feature.source,
            "pool": self.feature.pool,
            "backbone_norm": self.feature.norm,
            "vector_norm": self.norm,
            "fraction": self.share.fraction if few is None else None,
            "per_class": few,
            "rows": self.rows,
            "rate": self.rate,
            "edge": self.edge,
            "held_out": self.held_out,
            "top1": self.top1,
            **({} if self.top5 is None else {"top5": self.top5}),
            "images": self.images,
            "protocol": f"{self.protocol(recipe)}; {self.feature.about()}, no augmentation, "
            f"{transform}; {self.images} val images",
        }


def missing_classes(train: Bank, val: Bank) -> list[str]:
    """Notes on classes that one split has and the other has not."""
    there = {"train": {*train.y.tolist()}, "val": {*val.y.tolist()}}
    found = []
    for has, lacks in (("val", "train"), ("train", "val")):
        lost = sorted(there[has] - there[lacks])
        if lost:
            named = ", ".join(map(str, lost[:5])) + (", ..." if len(lost) > 5 else "")
            found.append(f"{len(lost)} classes of {has} have no image in {lacks}: {named}")
    return found
