"""PCA whitening: the matrix, and its product with rows, of which each has its own bits."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from contramask.functional.search import full_precision
from contramask.types import UserError

# Rows of one product.
TILE = 1024


def whitening(
    covariance: Float[Tensor, "F F"], least: Float[Tensor, ""], number: int | None
) -> Float[Tensor, "F G"]:
    """Principal directions over their standard deviations, most variance first.

    Args:
        covariance: of the rows.
        least: directions of which the standard deviation is not above it are dropped.
        number: how many are kept at most; None: all.

    Raises:
        UserError: if none is left.
    """
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0), vectors.flip(1)
    held = int((values.clamp(min=0).sqrt() > least).sum())
    if held == 0:
        raise UserError(
            "cleaning pca: the train rows are all alike, no direction varies; choose another "
            "feature or remove pca from cleanings"
        )
    held = min(held, number or held)
    basis = vectors[:, :held]
    # A direction has no sign of its own: the largest entry is made positive, on every machine.
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return basis * largest.sign() / values[:held].sqrt()


def times(x: Float[Tensor, "n F"], basis: Float[Tensor, "F G"], out: Tensor) -> None:
    """x @ basis into `out`, in products of one shape: a row's bits do not hang on the others.

    Columns are padded too: libraries end a product of odd width by another order of summing.
    """
    basis = pad(basis, (0, -basis.shape[1] % 64))
    with full_precision(x.device):
        for start in range(0, len(x), TILE):
            part = x[start : start + TILE]
            product = pad(part, (0, 0, 0, TILE - len(part))) @ basis
            out[start : start + TILE] = product[: len(part), : out.shape[1]]
