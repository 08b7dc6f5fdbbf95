"""Images as rows of patches, and the fixed positions of patches on their grid."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from contramask.types import UserError


def patchify(image: Float[Tensor, "B C H W"], patch: int) -> Float[Tensor, "B N PPC"]:
    """Cut an image into patches in row-major order; inside a patch: row, column, channel.

    The channel moves fastest, as in MAE (arXiv:2111.06377).
    """
    b, c, height, width = image.shape
    rows, columns = height // patch, width // patch
    x = image.reshape(b, c, rows, patch, columns, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, rows * columns, patch * patch * c)


def unpatchify(
    patches: Float[Tensor, "B N PPC"], patch: int, grid: tuple[int, int]
) -> Float[Tensor, "B C H W"]:
    """The inverse of `patchify` for a grid of (rows, columns) patches."""
    b, rows, columns = len(patches), *grid
    x = patches.reshape(b, rows, columns, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, rows * patch, columns * patch)


def blacken(
    image: Float[Tensor, "B C H W"], hidden: Bool[Tensor, "B N"], patch: int
) -> Float[Tensor, "B C H W"]:
    """The image with 0 in the place of hidden patches, for the eye."""
    grid = (image.shape[2] // patch, image.shape[3] // patch)
    shown = patchify(image, patch).where(~hidden[..., None], image.new_zeros(()))
    return unpatchify(shown, patch, grid)


def sincos(dim: int, grid: tuple[int, int], *, rows_first: bool = False) -> Float[Tensor, "N D"]:
    """Fixed two-dimensional sine-cosine positions of a grid of (rows, columns), in row-major order.

    A quarter of the channels each: sin and cos of one coordinate, then of the other, with
    frequencies 10000^(-i / (dim / 4)). MAE (arXiv:2111.06377) writes the column first, MoCo v3
    (arXiv:2104.02057) the row: with `rows_first` the table is the transpose of the other.
    """
    if dim % 4:
        raise UserError(
            f"sine-cosine positions need a width divisible by 4, given {dim}; set the width of the "
            "network (embed_dim, dim) or other positions"
        )
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    row, column = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij"
    )
    order = (row, column) if rows_first else (column, row)
    angles = [x.flatten()[:, None] * omega for x in order]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()
