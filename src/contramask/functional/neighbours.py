"""The vote of the nearest neighbours (Wu et al., 2018, arXiv:1805.01978), as DINO reads it.

Each of the k bank rows nearest to a query votes for its label: with weight exp(cosine / T), T =
0.07 (DINO, arXiv:2104.14294), or all alike. A vote of few neighbours is a prefix of the vote of
many, so every k is read off one search.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from contramask.functional.search import Metric, Nearest, Search
from contramask.types import UserError

Weights = Literal["exp", "uniform"]

# exp(1 / T) of smaller temperatures leaves float32.
COLDEST = 1 / 80


@torch.no_grad()
def nearest(
    queries: Float[Tensor, "Q D"],
    bank: Float[Tensor, "N D"],
    *,
    k: int,
    metric: Metric = "cosine",
    elements: int = 2**26,
) -> Nearest:
    """The k rows of the bank nearest to each query. Exact; memory and order: see `Search`.

    Raises:
        UserError: for a k outside 1..N.
    """
    check_k(k, len(bank))
    centre = bank.mean(0, dtype=torch.float64) if metric == "l2" else None
    search = Search(queries, k=k, metric=metric, centre=centre, elements=elements)
    search.add(bank, torch.arange(len(bank), device=bank.device))
    return search.found()


@torch.no_grad()
def vote(
    queries: Float[Tensor, "Q D"],
    bank: Float[Tensor, "N D"],
    labels: Int[Tensor, " N"],
    *,
    ks: tuple[int, ...],
    classes: int,
    temperature: float = 0.07,
    metric: Metric = "cosine",
    elements: int = 2**26,
) -> dict[int, Float[Tensor, "Q C"]]:
    """Votes per class for each k, in the order of `ks`; see `ballot`.

    Args:
        queries: rows of any length.
        bank: rows.
        labels: 0..classes-1, one for each row of the bank.
        ks: how many neighbours vote; the largest is searched for, the others are its prefixes.
        classes: the number of classes C.
        temperature: T; the smaller, the more the nearest decide.
        metric: `cosine`, whose votes are weighted; `dot` or `l2`, whose votes all count alike.
        elements: bound of the memory, see `Search`.

    Raises:
        UserError: for a k outside 1..N.
    """
    if not ks or min(ks) < 1:
        raise UserError(f"k-NN: ks is {list(ks)}; allowed are numbers of at least 1; set ks")
    found = nearest(queries, bank, k=max(ks), metric=metric, elements=elements)
    return ballot(
        found.similarities,
        labels[found.numbers],
        ks=ks,
        classes=classes,
        weights="exp" if metric == "cosine" else "uniform",
        temperature=temperature,
    )


def ballot(
    similarities: Float[Tensor, "Q k"],
    chosen: Int[Tensor, "Q k"],
    *,
    ks: tuple[int, ...],
    classes: int,
    weights: Weights,
    temperature: float = 0.07,
) -> dict[int, Float[Tensor, "Q C"]]:
    """Votes per class of the first k neighbours, for each k in the order of `ks`.

        exp:      votes[k][q, c] = sum over the k nearest with label c of exp(similarity / T)
        uniform:  how many of the k nearest have label c; of equally many the class of the
                  nearest neighbour wins, for which it gets a fraction of a vote more

    exp is DINO's, for cosines. Inner products and distances have no scale of their own, so that no
    T is theirs, and no official protocol weighs them: they vote uniformly.

    Args:
        similarities: of each neighbour, nearest first.
        chosen: the label it votes for.
        ks: how many vote.
        classes: the number of classes C.
        weights: `exp` or `uniform`.
        temperature: T of `exp`.

    Raises:
        UserError: for a temperature below 1 / 80.
    """
    if weights == "exp":
        check_temperature(temperature)
        return tally((similarities / temperature).exp(), chosen, ks=ks, classes=classes)
    most = similarities.shape[1]
    # k votes and their fractions need log2(k (k + 1)) binary digits; float32 has 24.
    exact = torch.float32 if most < 2**11 else torch.float64
    ones = torch.ones_like(similarities, dtype=exact)
    fractions = torch.arange(most, 0, -1, dtype=exact, device=ones.device) / (most + 1)
    return tally(ones, chosen, ks=ks, classes=classes, first=fractions)


def tally(
    weights: Float[Tensor, "Q k"],
    chosen: Int[Tensor, "Q k"],
    *,
    ks: tuple[int, ...],
    classes: int,
    first: Float[Tensor, " k"] | None = None,
) -> dict[int, Float[Tensor, "Q C"]]:
    """Sums of weights per class over the first k neighbours, for each k in the order of `ks`.

    Args:
        weights: of each neighbour, nearest first.
        chosen: the label it votes for.
        ks: how many vote.
        classes: the number of classes C.
        first: what a class gets beside, once, by the place of its nearest neighbour.
    """
    votes = weights.new_zeros((len(weights), classes))
    every = torch.arange(len(weights), device=weights.device)
    found: dict[int, Tensor] = {}
    # One neighbour at a time: no two votes of a step meet in one cell, so the sum has one order on
    # every device, where a scatter-add on a GPU would not.
    for j in range(max(ks)):
        now = weights[:, j]
        if first is not None:
            now = now + first[j] * (votes[every, chosen[:, j]] == 0)
        votes[every, chosen[:, j]] += now
        if j + 1 in ks:
            found[j + 1] = votes.clone()
    return {k: found[k] for k in ks}


def check_k(k: int, rows: int, *, own: bool = False) -> None:
    """Raise `UserError` unless 1 <= k <= rows of the bank; `own`: one of them is left out."""
    most = rows - own
    if not 1 <= k <= most:
        without = " without the image itself" if own else ""
        raise UserError(
            f"k-NN: k is {k}; the bank has {rows} labelled rows and k lies in 1..{most}{without}; "
            "set a smaller k or give more training images"
        )


def check_temperature(temperature: float) -> None:
    """Raise `UserError` for a temperature at which exp(1 / T) leaves float32."""
    if not temperature >= COLDEST:
        raise UserError(
            f"k-NN: temperature is {temperature:g}; allowed are {COLDEST:g} and more, DINO has "
            "0.07; set temperature"
        )
