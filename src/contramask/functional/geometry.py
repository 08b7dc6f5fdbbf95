"""Where features lie on the sphere, and how well they tell images apart from their views.

Features are brought to unit length here where the definition wants it; a row of zeros stays one.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from contramask.functional.moments import Moments
from contramask.functional.spectra import exp_entropy


def alignment(first: Float[Tensor, "B D"], second: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
    """Squared distance on the sphere of the two views of each image, 0 to 4 (arXiv:2005.10242).

    Its mean over images is the alignment: 0 where views do not matter, 2 where they have nothing
    in common. In float64. A row of zeros is 1 from every unit row and 0 from another of zeros.
    """
    a, b = (F.normalize(x.double(), dim=-1) for x in (first, second))
    return (a - b).square().sum(-1)


def uniformity_sums(features: Float[Tensor, "*L B D"], t: float = 2.0) -> Float[Tensor, "*L 2"]:
    """Sum of exp(-t ||x - y||^2) over the pairs of a batch on the sphere, and how many pairs.

    In float64. They add over batches and ranks; pairs are only taken inside a batch, which leaves
    the mean as it is. Each pair counts once, no row is paired with itself.
    """
    unit = F.normalize(features.double(), dim=-1)
    squares = unit.square().sum(-1)
    far = (squares[..., :, None] + squares[..., None, :] - 2 * unit @ unit.mT).clamp(min=0)
    near = (-t * far).exp().triu(1).sum((-2, -1))
    rows = unit.shape[-2]
    return torch.stack([near, torch.full_like(near, rows * (rows - 1) / 2)], -1)


def uniformity(sums: Float[Tensor, "*L 2"]) -> Float[Tensor, "*L"]:
    """log of the mean of exp(-t ||x - y||^2) over pairs (arXiv:2005.10242), from their sums.

    0 where all features are one, the lower the more evenly they are spread: near -2 t + 2 t^2 / D
    for random directions in many dimensions D. Without a pair 0, as for one point.
    """
    near, pairs = sums.unbind(-1)
    mean = near / pairs.clamp(min=1)
    # Of a huge t every exponential is 0: the smallest number stands for it.
    return torch.where(pairs > 0, mean.clamp(min=torch.finfo(mean.dtype).tiny).log(), 0.0)


def unit_sums(features: Float[Tensor, "*L N D"]) -> Float[Tensor, "*L 3 D"]:
    """Count, sum and sum of squares of each channel of unit features, in float64; they add."""
    unit = F.normalize(features.double(), dim=-1)
    return torch.stack([x.sum(-2) for x in (torch.ones_like(unit), unit, unit.square())], -2)


def feature_std(sums: Float[Tensor, "*L 3 D"]) -> Float[Tensor, "*L"]:
    """Mean over channels of the standard deviation over images of unit features, from their sums.

    The sign of collapse of SimSiam (arXiv:2011.10566, figure 2): 0 where all images are one point
    (1e-8 is rounding), 1 / sqrt(D) where they point everywhere alike. 0 without rows.
    """
    count, total, squares = sums.unbind(-2)
    count = count.clamp(min=1)
    return (squares / count - (total / count).square()).clamp(min=0).sqrt().mean(-1)


def view_moments(views: Float[Tensor, "n q D"]) -> tuple[Moments, Moments]:
    """Moments between images and inside them, from q views of each of n; both add over batches.

    Returns:
        Of the n means over views, and of the n q deviations from these means (whose mean is 0).
    """
    x = views.detach().double()
    means = x.mean(1) if x.shape[1] else x.sum(1)
    return Moments.of(means), Moments.of((x - means[:, None]).flatten(0, 1))


def lidar(between: Moments, within: Moments, delta: float = 1e-4) -> Float[Tensor, ""]:
    """exp of the entropy of the shares of the eigenvalues of Sw^-1/2 Sb Sw^-1/2 (arXiv:2312.04000).

    The number of directions that tell images apart against what augmentations change: at most
    min(D, n - 1), 1 if one direction does. Sb is the covariance of the images' means, Sw that of
    the views about them plus `delta`. The paper takes q = 50 views of n = 1000 images.

    `delta` is not relative to the features: rescaling them changes the value where the smallest
    eigenvalues of Sw are near it. The paper further adds a small constant to each share; it is
    left out here, where a share of 0 has entropy 0.

    Degenerate input: with one view Sw is `delta` and the value is the rank of Sb; where all images
    are one, or there are none, it is 1. NaN if a view is not finite.

    Args:
        between: the first of `view_moments`.
        within: the second.
        delta: of every eigenvalue of Sw, above 0.
    """
    if not (within.scatter.isfinite().all() and between.scatter.isfinite().all()):
        return within.scatter.new_tensor(torch.nan)  # LAPACK would refuse it
    values, axes = torch.linalg.eigh(within.covariance())
    whiten = axes * (values.clamp(min=0) + delta).rsqrt()
    found = torch.linalg.eigvalsh(whiten.mT @ between.covariance() @ whiten)
    return exp_entropy(found.clamp(min=0))
