"""The weighted nearest-neighbour vote of Wu et al., 2018 (arXiv:1805.01978), as DINO reads it.

Each of the k bank rows nearest to a query votes for its label with weight exp(cosine / T), T = 0.07
(DINO, arXiv:2104.14294). A vote of few neighbours is a prefix of the vote of many, so every k is
read off one pass.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from contramask.types import UserError


@torch.no_grad()
def nearest(
    queries: Float[Tensor, "Q D"], bank: Float[Tensor, "N D"], *, k: int, elements: int = 2**26
) -> tuple[Float[Tensor, "Q k"], Int[Tensor, "Q k"]]:
    """The k largest inner products of each query with the bank, and where; nearest first.

    Exact. Queries are taken in slices, so that at most max(elements, N) products are held at once:
    256 MiB in float32 by default, whatever the number of queries. The order of equal products is
    not defined.

    Raises:
        UserError: for a k outside 1..N.
    """
    if not 1 <= k <= len(bank):
        raise UserError(
            f"k-NN: k is {k}; the bank has {len(bank)} labelled rows and k lies in "
            f"1..{len(bank)}; set a smaller k or give more training images"
        )
    rows = max(1, elements // len(bank))
    tops = [(part @ bank.mT).topk(k, dim=1) for part in queries.split(rows)]  # (rows, N) -> k
    if not tops:
        empty = queries.new_empty((0, k))
        return empty, empty.long()
    return torch.cat([top.values for top in tops]), torch.cat([top.indices for top in tops])


@torch.no_grad()
def vote(
    queries: Float[Tensor, "Q D"],
    bank: Float[Tensor, "N D"],
    labels: Int[Tensor, " N"],
    *,
    ks: tuple[int, ...],
    classes: int,
    temperature: float = 0.07,
    elements: int = 2**26,
) -> dict[int, Float[Tensor, "Q C"]]:
    """Votes per class for each k, in the order of `ks`.

        votes[k][q, c] = sum over the k nearest rows n with labels[n] = c of exp(<q, n> / T)

    Args:
        queries: rows of unit length.
        bank: rows of unit length.
        labels: 0..classes-1, one for each row of the bank.
        ks: how many neighbours vote; the largest is searched for, the others are its prefixes.
        classes: the number of classes C.
        temperature: T; the smaller, the more the nearest decide.
        elements: bound of the memory, see `nearest`.

    Raises:
        UserError: for a k outside 1..N.
    """
    if not ks or min(ks) < 1:
        raise UserError(f"k-NN: ks is {list(ks)}; allowed are numbers of at least 1; set ks")
    products, places = nearest(queries, bank, k=max(ks), elements=elements)
    return tally((products / temperature).exp(), labels[places], ks=ks, classes=classes)


def tally(
    weights: Float[Tensor, "Q k"], chosen: Int[Tensor, "Q k"], *, ks: tuple[int, ...], classes: int
) -> dict[int, Float[Tensor, "Q C"]]:
    """Votes per class of the first k neighbours, for each k in the order of `ks`.

    Args:
        weights: of each neighbour, nearest first.
        chosen: the label it votes for.
        ks: how many vote.
        classes: the number of classes C.
    """
    votes = weights.new_zeros((len(weights), classes))
    every = torch.arange(len(weights), device=weights.device)
    found: dict[int, Tensor] = {}
    # One neighbour at a time: no two votes of a step meet in one cell, so the sum has one order on
    # every device, where a scatter-add on a GPU would not.
    for j in range(max(ks)):
        votes[every, chosen[:, j]] += weights[:, j]
        if j + 1 in ks:
            found[j + 1] = votes.clone()
    return {k: found[k] for k in ks}
