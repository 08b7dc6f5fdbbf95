"""Frequencies of tokens on their grid, and the rank and spectrum of features.

Fourier as in Park et al., 2023 (arXiv:2305.00729, figure 8) and the authors' published notebook;
spectra as in the pseudo-code they published.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

FOURIER_EPS = 1e-6
FLOOR = 1e-12  # of eigenvalues, relative to the largest: below it is rounding


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


def log_amplitudes(tokens: Float[Tensor, "B N C"], grid: tuple[int, int]) -> Float[Tensor, "B F"]:
    """`log_amplitude` of each image; the mean over images is `log_amplitude` of all.

    Only the F frequencies of the diagonal are computed, by one product with a table of waves
    instead of a transform. Tokens that are all alike have amplitude 0 but at frequency 0, which
    the constant added before the logarithm keeps from -inf; tokens of zeros give 0.

    Args:
        tokens: of the patches, by row.
        grid: their rows and columns.
    """
    rows, columns = (torch.arange(n, dtype=torch.float64, device=tokens.device) / n for n in grid)
    phase = (rows[:, None] + columns).flatten()  # (N), in turns
    frequency = torch.arange((min(grid) + 1) // 2, device=tokens.device)
    angle = 2 * math.pi * frequency[:, None] * phase  # (F, N)
    waves = torch.cat([angle.cos(), angle.sin()])
    # In float64, which neither autocast nor TF32 makes coarser.
    parts = (waves @ tokens.double()).unflatten(1, (2, len(frequency)))  # (B, 2, F, C)
    logs = (torch.hypot(*parts.unbind(1)) + FOURIER_EPS).log().mean(2)
    return (logs - logs[:, :1]).float()


def effective_rank(features: Float[Tensor, "M D"], eps: float = 1e-7) -> Float[Tensor, ""]:
    """exp of the entropy of the singular values' shares: RankMe (Garrido et al., arXiv:2210.02885).

    min(M, D) for a cloud that is as wide in every direction, 1 for a line through 0.
    """
    values = torch.linalg.svdvals(features.double())
    share = values / values.sum().clamp(min=torch.finfo(torch.float64).tiny) + eps
    return torch.exp(-(share * share.log()).sum()).to(features.dtype)


def exp_entropy(weights: Float[Tensor, "*L R"]) -> Float[Tensor, "*L"]:
    """exp of the entropy of weights' shares of their sum: R if all are equal, 1 if one is not 0.

    Also 1 where all weights are 0: nothing is spread.
    """
    total = weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return torch.special.entr(weights / total).sum(-1).exp()


def covariance_rank(matrix: Float[Tensor, "*L D D"]) -> Float[Tensor, "*L"]:
    """`effective_rank` of rows, from their second moment: exp of the entropy of singular values.

    The singular values of the rows are the square roots of the eigenvalues of the sum of their
    outer products, and shares know no scale. Of `Moments.second_moment()` it is RankMe (Garrido et
    al., arXiv:2210.02885) up to the constant that RankMe adds to shares; of
    `Moments.covariance()` the same of centred rows. 1 for a matrix of zeros.
    """
    return exp_entropy(_eigenvalues(matrix).sqrt())


def log_spectrum(matrix: Float[Tensor, "*L D D"], k: int) -> Float[Tensor, "*L k"]:
    """Logs of the k largest singular values of a covariance, relative to the largest.

    Park et al. (arXiv:2305.00729) take the covariance of mean patch tokens over images ("image
    level") and its singular values, which are its eigenvalues. Singular values of the centred
    features themselves are their square roots: half of this.

    What is below 1e-12 of the largest, and what a matrix smaller than k has not, is log 1e-12.
    For a matrix of zeros that is so in every place, the first included.
    """
    return _relative_logs(_eigenvalues(matrix), k)


def token_spectrum(tokens: Float[Tensor, "B N C"], k: int) -> Float[Tensor, "B k"]:
    """`log_spectrum` of the covariance of each image's tokens ("token level"), in float64.

    The eigenvalues are taken of the smaller of the (N, N) and (C, C) products of centred tokens.
    Tokens that are all alike have log 1e-12 in every place.
    """
    x = tokens.double()
    constant = x.amax(1, keepdim=True) == x.amin(1, keepdim=True)
    x = (x - x.mean(1, keepdim=True)).masked_fill(constant, 0.0)  # of a constant rounding is left
    small = x @ x.mT if x.shape[1] <= x.shape[2] else x.mT @ x
    return _relative_logs(_eigenvalues(small), k)


def _eigenvalues(matrix: Float[Tensor, "*L D D"]) -> Float[Tensor, "*L D"]:
    """Of a symmetric matrix without negative ones: largest first, rounding set to 0.

    NaN for a matrix that is not finite; LAPACK would refuse it together with all others.
    """
    finite = matrix.isfinite().all(-1).all(-1)[..., None]
    values = torch.linalg.eigvalsh(matrix.double().where(finite[..., None], 0.0)).flip(-1)
    values = values.where(values > FLOOR * values[..., :1], 0.0)
    return values.masked_fill(~finite, torch.nan)


def _relative_logs(values: Float[Tensor, "*L D"], k: int) -> Float[Tensor, "*L k"]:
    top = values[..., :1].clamp(min=torch.finfo(values.dtype).tiny)
    padded = torch.nn.functional.pad(values[..., :k], (0, max(0, k - values.shape[-1])))
    return (padded / top).clamp(min=FLOOR).log()
