"""Probes of single patches: nearest neighbours and a linear layer, of several sources at once.

Protocol: Vanyan et al., arXiv:2401.00463. They look for the one neighbour of largest inner product
among all labelled patches of the train images, and find that an MAE needs its channels of highest
variance removed, or z-scored, first; metrics, cleanings and numbers of neighbours are swept here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from contramask.functional.cleaning import Cleaner, Cleaning, fit
from contramask.functional.neighbours import (
    Weights,
    ballot,
    check_k,
    check_temperature,
    nearest,
)
from contramask.functional.search import Metric
from contramask.functional.segmentation import VOID
from contramask.probes.extraction import gather_rows
from contramask.probes.linear import LinearRecipe
from contramask.probes.patch_linear import PatchLinear
from contramask.types import UserError

# Patches are many: an epoch of them has as many steps as ten of single images.
OF_PATCHES = LinearRecipe(epochs=20)


@dataclass(frozen=True)
class PatchRecipe:
    """What is read from the patches of one source.

    Attributes:
        metrics: of k-NN: `dot`, the plain inner product (the paper), `cosine`, `l2`.
        cleanings: of k-NN: `raw`, `zscore`, `pca`, `top200` ..., see `Cleaning`.
        ks: numbers of neighbours; the paper has 1.
        weights: how several vote: `uniform`; `exp`, as DINO's k-NN, for `cosine` only, the others
            vote uniformly all the same.
        temperature: of `exp`.
        linear: cleanings before the linear layer; none: no linear layer is trained.
        recipe: how it is trained.

    Raises:
        UserError: for a cleaning, a k or a temperature that is not allowed, or nothing to do.
    """

    metrics: tuple[Metric, ...] = ("dot", "cosine")
    cleanings: tuple[str, ...] = ("raw", "zscore")
    ks: tuple[int, ...] = (1,)
    weights: Weights = "uniform"
    temperature: float = 0.07
    linear: tuple[str, ...] = ("raw",)
    recipe: LinearRecipe = OF_PATCHES

    def __post_init__(self) -> None:
        for word in (*self.cleanings, *self.linear):
            Cleaning.parse(word)
        if not self.cells():
            raise UserError(
                "patches: nothing is to be probed; set --metrics, --cleanings and --ks for "
                "nearest neighbours, or --linear"
            )
        if min(self.ks, default=1) < 1:
            raise UserError(f"patches: ks is {list(self.ks)}; they are 1 or more; set --ks")
        check_temperature(self.temperature)

    def cells(self) -> list["Cell"]:
        """All probes of one source, in the order of a table."""
        knn = [
            Cell("knn", cleaning, metric, k)
            for metric in self.metrics
            for cleaning in self.cleanings
            for k in self.ks
        ]
        return knn + [Cell("linear", cleaning) for cleaning in self.linear]

    def voting(self, metric: Metric) -> Weights:
        """How neighbours of a metric vote."""
        return self.weights if metric == "cosine" else "uniform"


@dataclass(frozen=True)
class Cell:
    """One probe of a source."""

    probe: str  # knn or linear
    cleaning: str
    metric: Metric | None = None
    k: int | None = None

    def __str__(self) -> str:
        kind = "linear" if self.probe == "linear" else f"{self.k}-NN, {self.metric}"
        return f"{kind}, {self.cleaning}"


class PatchRows:
    """Labelled patches of train as they come in, of several sources.

    Holds 4 F bytes a patch and source of this rank; what a source's `gathered` gives is of all
    ranks, and for a moment there are two copies.

    Args:
        widths: F of each source.
        device: where they are kept.
    """

    def __init__(self, widths: Sequence[int], device: torch.device):
        self.device = device
        self.parts = [[torch.empty((0, width), device=device)] for width in widths]
        nothing = torch.empty(0, dtype=torch.long, device=device)
        self.labels, self.images = [nothing], [nothing]
        self.count = 0  # images

    def add(
        self,
        features: Sequence[Float[Tensor, "T N _"]],
        labels: Int[Tensor, "T N"],
        image: Int[Tensor, " T"],
        *,
        images: int,
    ) -> None:
        """Some tiles: features of each source, labels, the number of the image of each tile.

        `images` is how many there are, some of which may have no labelled patch.
        """
        known = labels != VOID
        for part, x in zip(self.parts, features, strict=True):
            part.append(x[known].to(self.device))
        self.labels.append(labels[known].to(self.device))
        self.images.append(image[:, None].expand_as(labels)[known].to(self.device))
        self.count += images

    def gathered(self) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"], Int[Tensor, " P"]]:
        """Labels, numbers of images and the order of all ranks' rows: that of one rank alone."""
        image = gather_rows(torch.cat(self.images))
        order = image.argsort(stable=True)
        return gather_rows(torch.cat(self.labels))[order], image[order], order

    def features(self, source: int, order: Int[Tensor, " P"]) -> Float[Tensor, "P F"]:
        """The rows of one source of all ranks in that order; they are not kept any longer."""
        mine = torch.cat(self.parts[source])
        self.parts[source].clear()
        whole = gather_rows(mine)
        sorted_already = bool((order.diff() > 0).all())  # then no copy
        return whole if sorted_already else whole[order]


class SourceProbe:
    """All probes of one source, fitted.

    Holds the rows of train once for `raw` and once for each other cleaning of k-NN.

    Args:
        x: features of all labelled patches of train.
        y: their labels.
        image: the number of each one's image.
        classes: C.
        recipe: what is read.

    Raises:
        UserError: for a k above the number of rows, or what cleanings and the linear layer refuse.
    """

    def __init__(
        self,
        x: Float[Tensor, "P F"],
        y: Int[Tensor, " P"],
        image: Int[Tensor, " P"],
        *,
        classes: int,
        recipe: PatchRecipe,
    ):
        self.recipe, self.labels, self.classes = recipe, y, classes
        if recipe.metrics and recipe.cleanings and recipe.ks:
            check_k(max(recipe.ks), len(x))
        self.cleaners: dict[str, Cleaner] = {}
        self.banks: dict[str, Tensor] = {}
        self.heads: dict[str, PatchLinear] = {}
        for word in dict.fromkeys((*recipe.cleanings, *recipe.linear)):
            cleaner = self.cleaners[word] = fit(Cleaning.parse(word), x)
            rows = cleaner(x)
            if word in recipe.cleanings and recipe.metrics:
                self.banks[word] = rows
            if word in recipe.linear:
                head = PatchLinear(rows.shape[1], classes, recipe=recipe.recipe).to(x.device)
                head.fit(rows, y, image)
                self.heads[word] = head

    @torch.no_grad()
    def predict(self, x: Float[Tensor, "Q F"]) -> dict[Cell, Int[Tensor, " Q"]]:
        """The class of each patch by every probe."""
        r, found = self.recipe, dict[Cell, Tensor]()
        cleaned = {word: cleaner(x) for word, cleaner in self.cleaners.items()}
        for word, bank in self.banks.items():
            for metric in r.metrics if r.ks else ():
                near = nearest(cleaned[word], bank, k=max(r.ks), metric=metric)
                votes = ballot(
                    near.similarities,
                    self.labels[near.numbers],
                    ks=r.ks,
                    classes=self.classes,
                    weights=r.voting(metric),
                    temperature=r.temperature,
                )
                found |= {Cell("knn", word, metric, k): v.argmax(1) for k, v in votes.items()}
        for word, head in self.heads.items():
            found[Cell("linear", word)] = head.predict(cleaned[word]).argmax(1)
        return found
