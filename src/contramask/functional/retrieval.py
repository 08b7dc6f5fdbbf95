"""Rankings of a bank by similarity: average precision, recall, and near-duplicates.

In all of them a tie is lost: among equal scores what is not relevant comes first. So features that
are all alike retrieve nothing, and no number hangs on the order of the bank.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contramask.functional.search import full_precision

Metric = Literal["dot", "cosine", "l2"]

# Scores that are held at once, 256 MiB in float32; a few more arrays of this size come and go.
ELEMENTS = 2**26


def ready(rows: Float[Tensor, "*N D"], metric: Metric) -> Float[Tensor, "*N D"]:
    """Rows as `similarities` wants them: of unit length for `cosine`, which spares it the norms."""
    return F.normalize(rows.float(), dim=-1) if metric == "cosine" else rows.float()


def similarities(
    queries: Float[Tensor, "Q D"], bank: Float[Tensor, "N D"], metric: Metric
) -> Float[Tensor, "Q N"]:
    """The inner product, the cosine, or minus the squared Euclidean distance of `ready` rows.

    In float32 under autocast and TF32 too: coarser scores would tie rows that are not alike.
    """
    with full_precision(queries.device):
        products = queries @ bank.mT
        if metric != "l2":
            return products
        return 2 * products - queries.square().sum(1)[:, None] - bank.square().sum(1)


class Match(NamedTuple):
    """What the nearest patch of each of Q queries is. Ties are lost: all of the nearest must be."""

    patch: Bool[Tensor, " Q"]  # the one that was wanted
    image: Bool[Tensor, " Q"]  # one of the query's own image
    label: Bool[Tensor, " Q"]  # one of an image with its label
    elsewhere: Bool[Tensor, " Q"]  # of all patches of other images, one of an image with its label


@torch.no_grad()
def match_patches(
    queries: Float[Tensor, "Q D"],
    bank: Float[Tensor, "M P D"],
    wanted: Int[Tensor, " Q"],
    labels: Int[Tensor, " M"],
    *,
    metric: Metric = "dot",
    elements: int = ELEMENTS,
) -> Match:
    """Find each patch among all patches of M images, and among those of the other M - 1.

    Vanyan et al., 2024 (arXiv:2401.00463) take the inner product of features as they are. Only
    largest scores are compared, so the order of the bank decides nothing, on any device.

    Args:
        queries: `ready` rows.
        bank: `ready` rows.
        wanted: the patch that should be found, as a row of the bank of M x P patches; its image is
            the query's own.
        labels: of the images; `label` and `elsewhere` take those below 0 for one more label.
        metric: what is nearest.
        elements: scores held at once, at least M P.
    """
    size = bank.shape[1]
    found = [(torch.empty(0, dtype=torch.bool, device=queries.device),) * 4]
    for part, target in _slices(bank.shape[0] * size, elements, queries, wanted):
        scores = similarities(part, bank.flatten(0, 1), metric)
        right = scores.gather(1, target[:, None])
        home = (target // size)[:, None]
        best = scores.view(len(part), *bank.shape[:2]).amax(2)  # of each image
        alike = labels[home] == labels
        own = torch.zeros_like(alike).scatter_(1, home, value=True)
        alone = (scores >= right).sum(1) == 1  # the wanted patch itself
        hits = (_wins(best, own), _wins(best, alike))
        found.append((alone, *hits, _wins(best.masked_fill(own, -torch.inf), alike)))
    return Match(*map(torch.cat, zip(*found, strict=True)))


def _wins(scores: Float[Tensor, "Q M"], right: Bool[Tensor, "Q M"]) -> Bool[Tensor, " Q"]:
    """Whether the best of the right ones is above all others."""
    best, other = (scores.masked_fill(out, -torch.inf).amax(1) for out in (~right, right))
    return best > other


class Ranked(NamedTuple):
    """What a ranking of the bank is worth to each of Q queries; 0 where nothing is relevant."""

    relevant: Int[Tensor, " Q"]  # R, how many rows of the bank are relevant
    average_precision: Float[Tensor, " Q"]
    precision_at_r: Float[Tensor, " Q"]  # the summand of mAP@R
    first: Int[Tensor, " Q"]  # rank of the first relevant row, from 1


@torch.no_grad()
def rank(
    scores: Float[Tensor, "Q N"],
    relevant: Bool[Tensor, "Q N"],
    excluded: Bool[Tensor, "Q N"] | None = None,
) -> Ranked:
    """Average precisions and first ranks of given scores.

        AP = 1/R sum_i i / rank_i        AP@R = 1/R sum over rank_i <= R of i / rank_i

    where rank_i is the rank of the i-th relevant row. AP@R is MAP@R of Musgrave et al., 2020
    (arXiv:2003.08505), before its mean over queries. A query finds something at k (recall@k of
    retrieval) if its `first` is at most k.

    Args:
        scores: finite.
        relevant: what should come first.
        excluded: what takes no part, such as the query itself.
    """
    out = torch.zeros_like(relevant) if excluded is None else excluded
    wanted = relevant & ~out
    count = wanted.sum(1)
    others = scores.masked_fill(wanted | out, -torch.inf).sort(dim=1).values
    most = int(count.max()) if len(count) else 0
    best = scores.masked_fill(~wanted, -torch.inf).topk(most, dim=1).values
    ahead = scores.shape[1] - torch.searchsorted(others, best)  # others of at least this score
    i = torch.arange(1, most + 1, device=scores.device)
    there = i <= count[:, None]
    ranks = (i + ahead) * there
    precision = torch.where(there, i / ranks.clamp(min=1).double(), 0.0)
    within = precision * (ranks <= count[:, None])
    share = count.clamp(min=1)
    first = ranks[:, 0] if most else count
    return Ranked(count, precision.sum(1) / share, within.sum(1) / share, first)


@torch.no_grad()
def retrieve(
    queries: Float[Tensor, "Q D"],
    bank: Float[Tensor, "N D"],
    labels: tuple[Int[Tensor, " Q"], Int[Tensor, " N"]],
    images: tuple[Int[Tensor, " Q"], Int[Tensor, " N"]],
    *,
    metric: Metric = "cosine",
    elements: int = ELEMENTS,
) -> Ranked:
    """Rank the bank for each query; relevant are rows of its label.

    Args:
        queries: `ready` rows.
        bank: `ready` rows.
        labels: of queries and bank.
        images: a number of each image: a row with the query's own takes no part in its ranking.
        metric: of the similarity.
        elements: scores held at once, at least N.
    """
    found = [
        rank(
            similarities(part, bank, metric),
            label[:, None] == labels[1],
            image[:, None] == images[1],
        )
        for part, label, image in _slices(len(bank), elements, queries, labels[0], images[0])
    ]
    if not found:
        nothing = torch.zeros_like(labels[0])
        return Ranked(nothing, nothing.double(), nothing.double(), nothing)
    return Ranked(*map(torch.cat, zip(*found, strict=True)))


@torch.no_grad()
def find_originals(
    queries: Float[Tensor, "Q D"],
    bank: Float[Tensor, "N D"],
    originals: Int[Tensor, " Q"],
    *,
    metric: Metric = "cosine",
    elements: int = ELEMENTS,
) -> tuple[Float[Tensor, " Q"], Int[Tensor, " Q"]]:
    """For copies: the score of each with its original, and the rank of the original, from 1.

    Args:
        queries: `ready` rows, of copies.
        bank: `ready` rows, of originals and distractors.
        originals: the row of the bank that each query is a copy of.
        metric: of the similarity.
        elements: scores held at once, at least N.
    """
    found = [(queries.new_empty(0), originals.new_empty(0))]
    for part, target in _slices(len(bank), elements, queries, originals):
        scores = similarities(part, bank, metric)
        right = scores.gather(1, target[:, None])
        # At least its own score: the original itself is counted too, and so the rank begins at 1.
        found.append((right[:, 0], (scores >= right).sum(1)))
    return torch.cat([s for s, _ in found]), torch.cat([r for _, r in found])


@torch.no_grad()
def wrong_pairs_above(
    thresholds: Float[Tensor, " T"],
    queries: Float[Tensor, "Q D"],
    bank: Float[Tensor, "N D"],
    originals: Int[Tensor, " Q"],
    *,
    metric: Metric = "cosine",
    elements: int = ELEMENTS,
) -> Int[Tensor, " T"]:
    """How many pairs of a copy and what is not its original score at least each threshold.

    The counts of disjoint sets of queries add up. `thresholds` ascend; the other arguments are
    those of `find_originals`.
    """
    passed = torch.zeros(len(thresholds) + 1, dtype=torch.long, device=queries.device)
    for part, target in _slices(len(bank), elements, queries, originals):
        scores = similarities(part, bank, metric)
        scores.scatter_(1, target[:, None], -torch.inf)  # the right pairs are no wrong ones
        level = torch.searchsorted(thresholds, scores.flatten(), right=True)
        passed += level.bincount(minlength=len(passed))
    return passed.flip(0).cumsum(0).flip(0)[1:]


def micro_average_precision(above: Int[Tensor, " T"]) -> Float[Tensor, ""]:
    """muAP of copy detection (DISC21, arXiv:2106.09672): one ranking of all pairs of all queries.

    All pairs (query, row of the bank) are ranked by score, over all queries at once, so scores of
    different queries must be comparable. muAP = 1/T sum_i i / rank_i over the T right pairs, of
    which every query has one.

    Args:
        above: of each right pair in ascending order of its score, the number of wrong pairs that
            score at least as much; from `wrong_pairs_above`.
    """
    i = torch.arange(len(above), 0, -1, device=above.device)
    return (i / (i + above).double()).mean()


def _slices(columns: int, elements: int, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same slices of several tensors, of so many rows that rows x columns are `elements`."""
    step = max(1, elements // max(1, columns))
    for start in range(0, len(rows[0]), step):
        yield tuple(x[start : start + step] for x in rows)
