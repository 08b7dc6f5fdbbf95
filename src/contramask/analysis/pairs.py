"""What two models have in common beside CKA: their decisions, and their channels of variance."""

import torch
from jaxtyping import Float
from torch import Tensor

from contramask.analysis.analysis import interval
from contramask.analysis.classes import Predictions
from contramask.analysis.reading import Reading
from contramask.functional.agreement import f1_counts, kendall, macro_f1, outcomes
from contramask.functional.channels import overlap
from contramask.types import UserError, fold

TOP = 5  # classes of each model whose order is compared, the k of Shekhar et al. (tau@5)

RATES = {
    "agree/top1": "share of images on which both predict the same class",
    "agree/both_correct": "share of images on which both are right",
    "agree/both_incorrect": "share of images on which both are wrong",
    "agree/hamming": "share of images on which exactly one is right (arXiv:2304.13089)",
    "agree/tau": "Kendall's tau-b of the scores of the classes among either's best",
    "agree/tau_of_ids": "as published: of two lists of class ids (arXiv:2304.13089); see the docs",
}


def agreement(a: Predictions, b: Predictions, *, replicates: int = 0) -> list[Reading]:
    """How alike two models decide about the same images, from ridge regression on their features.

    Args:
        a: of one model.
        b: of the other, of the same images in the same order.
        replicates: bootstrap samples of images.

    Raises:
        UserError: if they are of other images.
    """
    if not torch.equal(a.label, b.label):
        raise UserError(
            f"agreement: predictions of {len(a.label)} and {len(b.label)} images that are not the "
            "same; analyse both models on the same data"
        )
    first, second = a.scores.argmax(1), b.scores.argmax(1)
    found, k = outcomes(first, second, a.label), min(TOP, a.scores.shape[1])
    tau, there = kendall(a.scores, b.scores, k)
    published, _ = kendall(a.scores, b.scores, k, of="class_ids")
    per_image = torch.stack(
        [
            found.same.double(), found.both_right.double(), found.both_wrong.double(),
            found.split.double(), tau.where(there, 0.0), published,
        ],
        1,
    )  # fmt: skip
    weights = _weights(len(first), replicates)  # (N, R)
    rates = weights.T @ per_image / weights.sum(0)[:, None].clamp(min=1)
    readings = []
    for (name, about), table in zip(RATES.items(), rates.T, strict=True):
        value, low, high = interval(table)
        readings.append(Reading(name, {}, value, "", about, low, high))
    f1 = macro_f1(f1_counts(first, second, a.scores.shape[1]))
    about = "macro F1 of one's predictions with the other's as reference (arXiv:2304.13089)"
    return [*readings, Reading("agree/f1", {}, f1.double(), "", about)]


def channels(a: Reading, b: Reading, name: str = "agree/top_channels") -> list[Reading]:
    """How many of the channels of the largest variance are the same, of `repr/top_channels`.

    Nothing for networks of different width. Of two models, or of one on two data sets.
    """
    if a.value.shape != b.value.shape:
        return []
    shared = overlap(a.value.long(), b.value.long()).double()
    about = f"of the {len(a.value)} channels that vary most, how many both have (arXiv:2401.00463)"
    return [Reading(name, {}, shared, "", about)]


def _weights(images: int, replicates: int) -> Float[Tensor, "N R"]:
    weights = torch.ones(images, 1 + replicates, dtype=torch.float64)
    generator = torch.Generator().manual_seed(fold("bootstrap", "pairs"))
    weights[:, 1:] = torch.poisson(weights[:, 1:], generator=generator)
    return weights
