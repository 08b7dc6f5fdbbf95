"""The weighted nearest-neighbour vote among the images themselves, each without its own vote.

The vote of Wu et al., 2018 (arXiv:1805.01978), as in `neighbours`, where the bank is the queries:
accuracy by depth without a second set of images.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from contramask.functional.neighbours import nearest, tally
from contramask.types import UserError


@torch.no_grad()
def leave_one_out_votes(
    x: Float[Tensor, "N D"],
    labels: Int[Tensor, " N"],
    *,
    ks: tuple[int, ...],
    classes: int,
    temperature: float = 0.07,
    elements: int = 2**26,
) -> dict[int, Float[Tensor, "N C"]]:
    """Votes per class of the k nearest other rows, for each k, in the order of `ks`.

        votes[k][i, c] = sum over the k rows n != i nearest to i with labels[n] = c of
                         exp(<i, n> / T)

    A row is left out by its index, so that its duplicates vote. Rows of zeros vote with weight 1.

    Args:
        x: rows of unit length.
        labels: 0..classes-1.
        ks: how many neighbours vote, 1..N-1.
        classes: C.
        temperature: T.
        elements: bound of the memory, see `nearest`.

    Raises:
        UserError: for a k outside 1..N-1, so also for fewer than two rows.
    """
    if not ks or min(ks) < 1 or max(ks) >= len(x):
        raise UserError(
            f"k-NN without the row itself: ks is {list(ks)}; {len(x)} rows allow k in "
            f"1..{len(x) - 1}; set a smaller k or give more images"
        )
    products, places = nearest(x, x, k=max(ks) + 1, elements=elements)
    every = torch.arange(len(x), device=x.device)
    # Itself to the end, the rest in order. Where as many duplicates came before it that it is not
    # among the k + 1, all of them are others and the last is one too many.
    order = (places == every[:, None]).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(ks)]
    weights = (products.gather(1, order) / temperature).exp()
    return tally(weights, labels[places.gather(1, order)], ks=ks, classes=classes)
