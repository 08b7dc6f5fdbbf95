"""Histograms of oriented gradients, as MaskFeat predicts them. Wei et al., 2022: arXiv:2112.09133.

The definition is that of the authors' code (SlowFast) and of its port in mmpretrain; Dalal and
Triggs' of 2005 interpolates between bins and cells and normalises over blocks of cells.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from contramask.types import UserError


def gradients(
    image: Float[Tensor, "B C H W"],
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
    """Sobel derivatives of each channel, left minus right and top minus bottom.

    The image is reflected at its border by one pixel. Sums of slices and no convolution: autocast
    would take that to half precision. The taps are added row by row, as a convolution adds them:
    8-bit images have many gradients that lie exactly between two bins, and what is left of them by
    rounding decides.
    """
    x = F.pad(image.float(), (1, 1, 1, 1), mode="reflect")
    a, b, c = x[..., :-2, :], x[..., 1:-1, :], x[..., 2:, :]  # the rows above, here and below
    gx = _left(a) - _right(a) + 2 * _left(b) - 2 * _right(b) + _left(c) - _right(c)
    gy = _left(a) + 2 * _middle(a) + _right(a) - _left(c) - 2 * _middle(c) - _right(c)
    return gx, gy


def _left(x: Tensor) -> Tensor:
    return x[..., :-2]


def _middle(x: Tensor) -> Tensor:
    return x[..., 1:-1]


def _right(x: Tensor) -> Tensor:
    return x[..., 2:]


def orientation(gx: Float[Tensor, "*S"], gy: Float[Tensor, "*S"], bins: int) -> Int[Tensor, "*S"]:
    """The bin of each direction: floor(atan2(gx, gy) / pi bins) mod bins.

    The angle is measured from the vertical, and opposite directions share a bin.
    """
    return (torch.atan2(gx, gy) / math.pi * bins).floor().long() % bins


def gaussian_window(side: int) -> Float[Tensor, "side side"]:
    """A Gaussian of standard deviation side // 2 around the middle of a square; its sum is 1."""
    place = torch.arange(side, dtype=torch.float32)
    row = torch.exp(-0.5 * ((place - place.mean()) / (side // 2)) ** 2)
    square = row[:, None] * row[None, :]
    return square / square.sum()


def hog(
    image: Float[Tensor, "B C H W"], *, bins: int = 9, cell: int = 8, window: int | None = 16
) -> Float[Tensor, "B C K h w"]:
    """Histograms of K = `bins` directions over cells of `cell` x `cell` pixels, of length 1.

    A pixel adds the length of its gradient, weighted by the Gaussian window it lies in, to the one
    bin of its direction. Histograms are normalised per cell and channel, so neither the channels'
    scale nor their mean matters.

    Args:
        image: H and W are multiples of `cell` and `window`.
        bins: of directions in half a turn.
        cell: side of a cell in pixels.
        window: side in pixels of the Gaussian windows that tile the image; None: equal weights.

    Raises:
        UserError: for sizes that do not divide.
    """
    check_sizes((image.shape[2], image.shape[3]), cell=cell, window=window)
    gx, gy = gradients(image)
    index, weight = orientation(gx, gy, bins), (gx.square() + gy.square()).sqrt()
    if window is not None:
        tiles = (image.shape[2] // window, image.shape[3] // window)
        weight = weight * gaussian_window(window).to(weight.device).repeat(tiles)
    cells = (-1, cell)
    # Bin by bin: all at once would take `bins` times the memory of the batch.
    sums = [
        torch.where(index == k, weight, 0.0).unflatten(3, cells).unflatten(2, cells).sum((3, 5))
        for k in range(bins)
    ]
    return F.normalize(torch.stack(sums, 2), dim=2)


def hog_of_patches(
    image: Float[Tensor, "B C H W"],
    patch: int,
    *,
    bins: int = 9,
    cell: int = 8,
    window: int | None = 16,
) -> Float[Tensor, "B N Z"]:
    """The histograms of the cells of every patch, patches in row-major order.

    Inside a patch: channel, bin, row of the cell, column of the cell; the last moves fastest, as in
    mmpretrain. With 3 channels, 9 bins and 2 x 2 cells these are 108 numbers.
    """
    side = (-1, patch // cell)
    found = hog(image, bins=bins, cell=cell, window=window)  # (B, C, K, h, w)
    found = found.unflatten(4, side).unflatten(3, side)  # (B, C, K, rows, i, columns, j)
    return found.permute(0, 3, 5, 1, 2, 4, 6).flatten(3).flatten(1, 2)


def check_sizes(size: tuple[int, int], *, cell: int, window: int | None) -> None:
    """Raise a `UserError` unless cells and windows tile an image of (height, width) pixels."""
    for name, side in (("cell", cell), ("window", window)):
        if side is not None and (side < 1 or size[0] % side or size[1] % side):
            raise UserError(
                f"HOG: {name} is {side} pixels and the image {size[0]} x {size[1]}; it must divide "
                f"both{', or be null for equal weights' * (name == 'window')}; set {name} at "
                "model.objectives.NAME.init_args"
            )
