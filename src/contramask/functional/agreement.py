"""How alike two classifiers decide about the same images.

The comparisons of Shekhar et al., 2023 (arXiv:2304.13089): top-1 predictions, correctness, and the
order of the classes. What is a mean over images is handed out per image, so that callers can
resample images.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contramask.types import UserError


class Outcomes(NamedTuple):
    """Of each image: the mean over images is the rate."""

    same: Bool[Tensor, " N"]  # the two predict the same class: agreement
    both_right: Bool[Tensor, " N"]
    both_wrong: Bool[Tensor, " N"]
    same_wrong: Bool[Tensor, " N"]  # both wrong, with the same class
    split: Bool[Tensor, " N"]  # exactly one is right; its mean is the normalised Hamming distance


def outcomes(
    first: Int[Tensor, " N"], second: Int[Tensor, " N"], labels: Int[Tensor, " N"]
) -> Outcomes:
    """What two models make of each image.

    `both_right`, `both_wrong` and `split` add up to 1 in every image, and `split` has a mean that
    is the normalised Hamming distance of the two vectors of correctness. Without images all are
    empty. Images without a label (-1) would count as wrong: leave them out.

    Args:
        first: the classes one model predicts.
        second: those of the other.
        labels: the true ones.
    """
    same, a, b = first == second, first == labels, second == labels
    return Outcomes(same, a & b, ~a & ~b, same & ~a, a ^ b)


def f1_counts(
    first: Int[Tensor, "*R N"], second: Int[Tensor, "*R N"], classes: int
) -> Int[Tensor, "*R 3 C"]:
    """Sums that `macro_f1` reads; they add over batches and ranks.

    Args:
        first: predictions of one model, 0..classes-1; with draws of images R to resample.
        second: those of the other.
        classes: C.

    Returns:
        How often both predict a class, how often the first does, how often the second.
    """
    draws = first.shape[:-1].numel()
    # Class `classes` stands for no agreement; each draw has its own cells.
    both = first.masked_fill(first != second, classes)
    cell = torch.arange(draws, device=first.device)[:, None] * (classes + 1)

    def count(ids: Tensor) -> Tensor:
        flat = (ids.long().reshape(draws, first.shape[-1]) + cell).flatten()
        table = torch.bincount(flat, minlength=draws * (classes + 1))
        return table.view(*first.shape[:-1], classes + 1)[..., :classes]

    return torch.stack([count(both), count(first), count(second)], -2)


def macro_f1(counts: Int[Tensor, "*R 3 C"]) -> Float[Tensor, "*R"]:
    """Mean over classes of the F1 of one model's predictions with the other's as reference.

        F1_c = 2 both_c / (first_c + second_c)

    It is symmetric. The mean is over the classes that at least one of them predicts; 0 where there
    are no images.
    """
    both, first, second = counts.double().unbind(-2)
    either = first + second
    f1 = 2 * both / either.clamp(min=1)
    return f1.sum(-1) / (either > 0).sum(-1).clamp(min=1)


def kendall(
    first: Float[Tensor, "N C"],
    second: Float[Tensor, "N C"],
    k: int,
    *,
    of: Literal["scores", "class_ids"] = "scores",
    elements: int = 2**24,
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """Kendall's tau-b of the two models' orders of classes, of each image, and where there is one.

    `scores`: of the scores of all classes that are among the k best of either model. The two
    models order the same set; -1 is the opposite order, 1 the same.

    `class_ids`: as the published code of Shekhar et al. (arXiv:2304.13089) does: of the two lists
    of the ids of the k best classes, best first. It compares how the ids rise and fall along the
    lists and depends on how classes are numbered; only for comparison with the published numbers.

    An image without a pair in different order (all scores equal in one model, one class only) has
    no tau: 0, and False in the second result. The published mean divides by all images, with 0
    for those, so it is the mean of the first result.

    Args:
        first: scores of one model; of equal scores the class of the lower index is the better.
        second: scores of the other.
        k: how many classes of each model count.
        of: what is put in order.
        elements: how many pairs of classes are compared at once.

    Raises:
        UserError: for a k outside 1..C.
    """
    classes = first.shape[1]
    if not 1 <= k <= classes:
        raise UserError(
            f"Kendall's tau: k is {k}; of {classes} classes it is in 1..{classes}; set k"
        )
    rows = max(1, elements // (2 * k) ** 2)
    value, defined = first.new_zeros(len(first), dtype=torch.float64), first.new_zeros(len(first))
    for start in range(0, len(first), rows):
        here = slice(start, start + rows)
        a, b = first[here], second[here]
        tops = [x.sort(dim=1, descending=True, stable=True).indices[:, :k] for x in (a, b)]
        if of == "class_ids":
            value[here], defined[here] = tau_b(tops[0], tops[1], torch.ones_like(tops[0]) > 0)
        else:
            again = (tops[1][:, :, None] == tops[0][:, None]).any(2)  # is in the first list too
            there = torch.cat([torch.ones_like(again), ~again], 1)
            union = torch.cat(tops, 1)
            value[here], defined[here] = tau_b(a.gather(1, union), b.gather(1, union), there)
    return value, defined.bool()


def tau_b(
    x: Float[Tensor, "N m"] | Int[Tensor, "N m"],
    y: Float[Tensor, "N m"] | Int[Tensor, "N m"],
    there: Bool[Tensor, "N m"],
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """Kendall's tau-b of every row, over the places that are there, and where it is defined.

        (concordant - discordant) / sqrt(pairs not tied in x * pairs not tied in y)

    0 and False where all is tied in x or in y.
    """
    pair = there[:, :, None] & there[:, None]

    def order(z: Tensor) -> Tensor:  # not the sign of a difference: infinities compare too
        above, below = z[:, :, None] > z[:, None], z[:, :, None] < z[:, None]
        return (above & pair).to(torch.int8) - (below & pair).to(torch.int8)

    a, b = order(x), order(y)
    agree = (a * b).sum((1, 2), dtype=torch.int64).double()
    untied = [z.abs().sum((1, 2), dtype=torch.int64).double() for z in (a, b)]
    product = untied[0] * untied[1]
    return agree / product.clamp(min=1).sqrt(), product > 0
