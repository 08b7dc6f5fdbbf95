"""Frequencies of tokens on their grid, and the rank of features.

Fourier as in Park et al., 2023 (arXiv:2305.00729, figure 8) and the authors' published notebook.
"""

import torch
from jaxtyping import Float
from torch import Tensor

FOURIER_EPS = 1e-6


def log_amplitude(tokens: Float[Tensor, "B N C"], grid: tuple[int, int]) -> Float[Tensor, " F"]:
    """Log amplitude by frequency along the diagonal, relative to frequency 0.

    The logarithm is taken of every image and channel, then the mean. Entry i is the frequency
    i / (grid / 2) of pi in both directions; the last one is what the paper plots over depth.

    Args:
        tokens: of the patches, by row.
        grid: their rows and columns.
    """
    image = tokens.float().unflatten(1, grid)  # (B, rows, columns, C)
    logs = (torch.fft.fft2(image, dim=(1, 2)).abs() + FOURIER_EPS).log().mean((0, 3))
    diagonal = logs.diagonal()[: (min(grid) + 1) // 2]  # frequency 0 lies first without a shift
    return diagonal - diagonal[0]


def effective_rank(features: Float[Tensor, "M D"], eps: float = 1e-7) -> Float[Tensor, ""]:
    """exp of the entropy of the singular values' shares: RankMe (Garrido et al., arXiv:2210.02885).

    min(M, D) for a cloud that is as wide in every direction, 1 for a line through 0.
    """
    values = torch.linalg.svdvals(features.double())
    share = values / values.sum().clamp(min=torch.finfo(torch.float64).tiny) + eps
    return torch.exp(-(share * share.log()).sum()).to(features.dtype)
