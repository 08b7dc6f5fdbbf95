"""What probes know of degraded images, and which cue they follow: shape or texture."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contramask.probes.evaluation import SCORED
from contramask.probes.grouped_linear import GroupedLinear
from contramask.probes.linear import LinearRecipe
from contramask.probes.probe import Probe
from contramask.types import UserError, fold

Split = Literal["source", "other", "random"]

SPLITS: dict[Split, str] = {
    "source": "no source picture of the decoded cue is both trained on and tested",
    "other": "no class of the other cue is both trained on and tested",
    "random": "images are dealt at random within each class",
}


def relative_drop(clean: float, degraded: float) -> float | None:
    """The part of the clean accuracy that is lost; None where there is none to lose."""
    return None if clean == 0 else (clean - degraded) / clean


@torch.no_grad()
def right(probe: Probe, x: Float[Tensor, "N F"], y: Int[Tensor, " N"]) -> Bool[Tensor, " N"]:
    """Which images a probe gives their label; one of a class it has not learnt is wrong."""
    parts = [
        probe.predict(rows).argmax(1).to(y.device) == labels
        for rows, labels in zip(x.split(SCORED), y.split(SCORED), strict=True)
    ]
    return torch.cat(parts) if parts else y.new_zeros(0, dtype=torch.bool)


def classes_to_learn(y: Int[Tensor, " N"], where: str) -> int:
    """The number of classes of labels 0 .. C-1.

    Raises:
        UserError: where fewer than two of them have images.
    """
    present = len(y.unique())
    if present < 2:
        raise UserError(
            f"robustness probe: {where} has images of {present} class(es); a probe needs at least "
            f"two; set {where} to labelled shards of several classes"
        )
    return int(y.max()) + 1


# ---- decoding of one cue --------------------------------------------------------------------


@dataclass(frozen=True)
class Decoded:
    """How well one cue is read in cross-validation.

    Attributes:
        folds: top-1 accuracy on each fold, of a probe trained on the others.
        from_other: the same of the best guess from the class of the other cue alone: what the
            counts of pairs give away. Chance where the design is balanced.
        unseen: images tested whose class no image trained on had; they are missed.
    """

    folds: tuple[float, ...]
    from_other: float
    unseen: int

    @property
    def mean(self) -> float:
        """Of the folds."""
        return statistics.fmean(self.folds)

    @property
    def spread(self) -> float:
        """The standard deviation over folds (n - 1)."""
        return statistics.stdev(self.folds)


def deal(
    strata: Int[Tensor, " N"], groups: Int[Tensor, " N"], folds: int, *, seed: int
) -> Int[Tensor, " N"]:
    """A fold for each image: whole groups, dealt in turn within each stratum in a seeded order.

    The turn goes on from one stratum to the next, so folds hold equally many groups, or one more.

    Args:
        strata: e.g. the class; each has its groups in as many folds as there are.
        groups: images that stay together; a group lies in one stratum.
        folds: how many.
        seed: of the order of the groups.

    Raises:
        UserError: for fewer than two folds, or fewer groups than folds.
    """
    count = len(torch.unique(groups))
    if folds < 2 or count < folds:
        raise UserError(
            f"cue: {folds} folds of {len(groups)} images in {count} groups that stay together; "
            "allowed are 2 folds up to the number of groups; set cue.folds, or give more images"
        )
    placed, turn = torch.zeros_like(groups), 0
    for stratum in strata.unique().tolist():
        inside = groups[strata == stratum].unique()
        generator = torch.Generator().manual_seed(fold(seed, "folds", stratum))
        for group in inside[torch.randperm(len(inside), generator=generator)].tolist():
            placed[groups == group] = turn % folds
            turn += 1
    return placed


def decodability(
    x: Float[Tensor, "N F"],
    y: Int[Tensor, " N"],
    other: Int[Tensor, " N"],
    placed: Int[Tensor, " N"],
    recipe: LinearRecipe,
    groups: Int[Tensor, " N"] | None = None,
) -> Decoded:
    """Cross-validation of a linear probe: each fold is read by a probe of the other folds.

    The learning rate is chosen on a part of those other folds: on whole groups.

    Args:
        x: features.
        y: the class of the cue that is decoded.
        other: the class of the other cue.
        placed: the fold of each image, see `deal`.
        recipe: of the probes.
        groups: images that stay together, as in `deal`; None: each is one.

    Raises:
        UserError: if the images are of fewer than two classes, or of too few groups.
    """
    classes, found, guessed, unseen = classes_to_learn(y, "cue.data"), [], 0, 0
    for number in placed.unique().tolist():
        test = (placed == number).to(x.device)
        probe = GroupedLinear(x.shape[1], classes, recipe=recipe).to(x.device)
        probe.fit(x[~test], y[~test], None if groups is None else groups[~test])
        found.append(right(probe, x[test], y[test]).float().mean().item())
        guess = _best_guess(y[~test], other[~test], classes, int(other.max()) + 1)
        guessed += int((guess[other[test]] == y[test]).sum())
        unseen += int((~torch.isin(y[test], y[~test])).sum())
    return Decoded(tuple(found), guessed / len(y), unseen)


def _best_guess(y: Tensor, other: Tensor, classes: int, others: int) -> Int[Tensor, " K"]:
    """For each class of the other cue the y most often seen with it; where none: most often."""
    pairs = torch.zeros(others, classes, dtype=torch.long, device=y.device)
    pairs.index_put_((other, y), torch.ones_like(y), accumulate=True)
    most = pairs.sum(0).argmax()
    return torch.where(pairs.sum(1) > 0, pairs.argmax(1), most)


# ---- which cue decides ----------------------------------------------------------------------


@dataclass(frozen=True)
class Decisions:
    """What a classifier decided on images whose shape and texture are of two classes.

    Attributes:
        shape: images given the class of their shape.
        texture: of their texture.
        neither: of neither.
    """

    shape: int
    texture: int
    neither: int

    @classmethod
    def of(
        cls,
        decided: Int[Tensor, " N"],
        shape: Int[Tensor, " N"],
        texture: Int[Tensor, " N"],
    ) -> "Decisions":
        """Count them. Images without a conflict must have been left out."""
        assert not bool((shape == texture).any()), "an image without a conflict decides nothing"
        by_shape, by_texture = int((decided == shape).sum()), int((decided == texture).sum())
        return cls(by_shape, by_texture, len(decided) - by_shape - by_texture)

    @property
    def shape_bias(self) -> float | None:
        """Shape decisions of those for one of the cues (arXiv:1811.12231); None without any."""
        decided = self.shape + self.texture
        return self.shape / decided if decided else None

    @property
    def images(self) -> int:
        """All that were asked."""
        return self.shape + self.texture + self.neither


def matched(names: Sequence[str], wanted: Sequence[str]) -> Int[Tensor, " K"]:
    """For each name its place in `wanted`, -1 where it has none."""
    places = {name: i for i, name in enumerate(wanted)}
    return torch.tensor([places.get(name, -1) for name in names], dtype=torch.long)
