"""The splits in which a cue is decoded: what stays together in each, and which images allow."""

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from contramask.probes.linear import LinearRecipe
from contramask.probes.robustness import SPLITS, Split
from contramask.types import UserError

# What stays together.
GROUPS: dict[Split, str] = {
    "source": "source pictures of the decoded cue",
    "other": "classes of the other cue",
    "random": "images",
}


def groups_of(y: Int[Tensor, "N 4"]) -> dict[Split, tuple[Int[Tensor, " N"], Int[Tensor, " N"]]]:
    """Split -> which images stay together when shape and when texture is decoded.

    Args:
        y: shape, texture, and the pictures they come from as numbers, -1 where nobody knows; then
            there is no split of sources.
    """
    each = torch.arange(len(y), device=y.device)
    found: dict[Split, tuple[Tensor, Tensor]] = {
        "source": (y[:, 2], y[:, 3]),
        "other": (y[:, 1], y[:, 0]),
        "random": (each, each),
    }
    if bool((y[:, 2:] < 0).any()):
        del found["source"]
    return found


def skipped_of(
    groups: Mapping[Split, tuple[Tensor, Tensor]], folds: int, recipe: LinearRecipe
) -> dict[Split, str]:
    """The splits that the images do not allow, and why."""
    found: dict[Split, str] = {}
    for split in SPLITS:
        if split not in groups:
            found[split] = "keys do not name the pictures as in cat3-dog2"
            continue
        reasons = [too_few(some, folds, recipe) for some in groups[split]]
        for reason in filter(None, reasons):
            found.setdefault(split, reason)
    return found


def too_few(groups: Int[Tensor, " N"], folds: int, recipe: LinearRecipe) -> str | None:
    """Why groups cannot be dealt to folds, each read by a probe of the others; None: they can."""
    count = len(groups.unique())
    if count < folds:
        return f"there are {count} groups of images that stay together for {folds} folds"
    # To learn from and to choose a learning rate on, beside the largest fold.
    if len(recipe.rates) > 1 and count - -(-count // folds) < 2:
        return (
            f"of {count} groups of images that stay together {folds} folds leave one, and to "
            "choose a learning rate takes two"
        )
    return None


def check_split(split: Split | None, skipped: Mapping[Split, str]) -> None:
    """Raise `UserError` where a split is asked for, or all are, that the images do not allow."""
    allowed = [each for each in SPLITS if each not in skipped]
    if split is not None and split in skipped:
        raise UserError(
            f"cue.split is {split!r}, but {skipped[split]}; allowed are "
            f"{' and '.join(allowed) or 'none'}; set cue.split, or cue.folds lower"
        )
    if not allowed:
        raise UserError(
            f"cue: {skipped['random']}; set cue.folds lower, or cue.data to more images"
        )


def rate_in_words(split: Split, recipe: LinearRecipe) -> str:
    """How the probe of a fold comes to its learning rate, for a protocol."""
    if len(recipe.rates) == 1:
        return f"learning rate {recipe.rates[0]:g} x batch/256"
    return (
        f"in each fold the learning rate is the best of {len(recipe.rates)} on held-out images, "
        f"those of {recipe.holdout:.0%} of the {GROUPS[split]} trained on"
    )
