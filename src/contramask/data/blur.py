"""The Gaussian blur of whole batches, each sample with its own sigma."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def blur(
    x: Float[Tensor, "B 3 H W"], sigma: Float[Tensor, " B"], taps: Float[Tensor, " B"]
) -> Float[Tensor, "B 3 H W"]:
    """A Gaussian of each sample's own sigma (pixels; 0: unchanged), reflected at the border.

    Two products with banded matrices: the sigma differ, so a convolution would need one group per
    sample and a kernel as long as the largest.
    """
    rows, columns = (gaussian_matrix(sigma, taps, n)[:, None] for n in x.shape[2:])
    return ((rows @ x).flatten(1, 2) @ columns.mT[:, 0]).view_as(x)


def gaussian_matrix(
    sigma: Float[Tensor, " B"], taps: Float[Tensor, " B"], size: int
) -> Float[Tensor, "B n n"]:
    """The blur of a line of `size` pixels as a matrix; its rows sum to 1.

    The kernel is `taps` pixels long; 0: cut at 3 sigma.
    """
    out = torch.arange(size, device=sigma.device, dtype=sigma.dtype)
    i, j = out[:, None], out[None]
    sigma, taps = sigma[:, None, None], taps[:, None, None]
    reach = torch.where(taps > 0, (taps - 1) / 2, torch.ceil(3 * sigma))
    scale = -0.5 / sigma.clamp(min=1e-3) ** 2

    def weight(distance: Tensor) -> Tensor:
        return torch.exp(scale * distance**2) * (distance <= reach)

    # The mirror images of pixel j beyond both ends; the end pixels themselves have none.
    matrix = weight((i - j).abs())
    matrix = matrix + weight(i + j) * (j > 0) + weight(2 * (size - 1) - i - j) * (j < size - 1)
    return matrix / matrix.sum(-1, keepdim=True)


def radius(sigma: float, taps: int) -> int:
    """How far the blur reaches, in pixels; `taps` as in `gaussian_matrix`."""
    return taps // 2 if taps else math.ceil(3 * sigma)
