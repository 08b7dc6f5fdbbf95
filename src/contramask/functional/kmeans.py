"""Mini-batch k-means, for codebooks (Sculley, 2010: Web-scale k-means clustering)."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from contramask.types import UserError

CHUNK = 1 << 26  # distances at once: 256 MB
CHECK = 10  # steps between two looks for centres that nobody is near to


def nearest(x: Float[Tensor, "N D"], centres: Float[Tensor, "K D"]) -> Int[Tensor, " N"]:
    """The nearest centre of each row, by Euclidean distance; of equals the first."""
    half = centres.square().sum(1) / 2
    rows = max(1, CHUNK // len(centres))
    return torch.cat([(half - part @ centres.T).argmin(1) for part in x.split(rows)])


def kmeans(
    x: Float[Tensor, "N D"],
    count: int,
    *,
    steps: int = 200,
    batch: int = 16384,
    seed: int = 0,
    tell: Callable[[int], None] | None = None,
) -> Float[Tensor, "K D"]:
    """`count` centres of the rows, a function of the arguments alone.

        each step: a random batch of rows goes to the nearest centres;
                   a centre is the mean of all rows that ever came to it

    It begins at random rows. In the first four fifths of the steps, centres to which no row came
    for ten steps begin anew at rows of the batch, drawn in proportion to their squared distance
    from their centre: a codebook is to be used whole.

    Args:
        x: rows on the CPU, whose sums have one order.
        count: of the centres.
        steps: batches.
        batch: rows of a step.
        seed: of all that is random.
        tell: called with the number of each finished step.

    Raises:
        UserError: for fewer rows than centres.
    """
    if len(x) < count:
        raise UserError(
            f"{len(x)} patches for a vocabulary of {count}; there must be as many; give more "
            "images, or a smaller vocabulary"
        )
    generator = torch.Generator().manual_seed(seed)
    centres = x[torch.randperm(len(x), generator=generator)[:count]].clone()
    total, recent = torch.zeros(count), torch.zeros(count)
    for step in range(1, steps + 1):
        rows = x[torch.randint(len(x), (min(batch, len(x)),), generator=generator)]
        ids = nearest(rows, centres)
        came = torch.bincount(ids, minlength=count).to(x.dtype)
        sums = torch.zeros_like(centres).index_add_(0, ids, rows)
        total, recent = total + came, recent + came
        share = 1 / total.clamp(min=1)
        centres = centres + share[:, None] * (sums - came[:, None] * centres)
        if step % CHECK == 0:
            alone = recent == 0
            if alone.any() and step <= 0.8 * steps:
                far = (rows - centres[ids]).square().sum(1) + 1e-12  # drawn also if all are 0
                new = torch.multinomial(far, int(alone.sum()), True, generator=generator)
                centres[alone], total[alone] = rows[new], 0
            recent = torch.zeros(count)
        if tell is not None:
            tell(step)
    return centres


def perplexity(ids: Int[Tensor, "..."], count: int) -> tuple[float, int]:
    """How many words are in use: exp of the entropy of their frequencies, and those that occur."""
    share = torch.bincount(ids.flatten(), minlength=count).double()
    share = share[share > 0] / share.sum()
    return float(torch.exp(-(share * share.log()).sum())), len(share)
