"""Linear centred kernel alignment of many layers at once, from minibatches.

Nguyen et al., 2021 (arXiv:2010.15327): unbiased HSIC of a minibatch, summed over minibatches before
the ratio is taken, as Shekhar et al. 2023 (arXiv:2304.13089) compare ViTs.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def gram(features: Float[Tensor, "n ..."]) -> Float[Tensor, "n n"]:
    """Inner products of the flattened features of every two images, in float64.

    The features are centred first, which changes no value of `hsic` and keeps it from cancelling.
    """
    x = features.flatten(1).double()
    x = x - x.mean(0)
    return x @ x.T


def hsic(k: Float[Tensor, "L n n"], l: Float[Tensor, "M n n"]) -> Float[Tensor, "L M"]:
    """Unbiased HSIC of every Gram matrix of one set with every one of another.

        1 / (n (n - 3)) [tr(K L) + (1'K 1)(1'L 1) / ((n - 1)(n - 2)) - 2 / (n - 2) 1'K L 1]

    where K and L have a zero diagonal (Song et al., 2012; arXiv:2010.15327, eq. 3). Three matrix
    products serve all pairs.

    Args:
        k: Gram matrices over n images, n > 3.
        l: the same images.
    """
    n = k.shape[-1]
    k, l = (x - torch.diag_embed(x.diagonal(dim1=1, dim2=2)) for x in (k, l))
    rows = k.sum(2), l.sum(2)  # (L, n), (M, n)
    sums = rows[0].sum(1), rows[1].sum(1)
    trace = k.flatten(1) @ l.flatten(1).T  # both are symmetric
    mean = sums[0][:, None] * sums[1] / ((n - 1) * (n - 2))
    return (trace + mean - 2 / (n - 2) * rows[0] @ rows[1].T) / (n * (n - 3))


def hsic_of_pairs(k: Float[Tensor, "L n n"], l: Float[Tensor, "L n n"]) -> Float[Tensor, " L"]:
    """`hsic` of each Gram matrix of one set with the one at its place in another.

    Args:
        k: Gram matrices over n images, n > 3.
        l: as many, of the same images.
    """
    n = k.shape[-1]
    k, l = (x - torch.diag_embed(x.diagonal(dim1=1, dim2=2)) for x in (k, l))
    rows = k.sum(2), l.sum(2)
    mean = rows[0].sum(1) * rows[1].sum(1) / ((n - 1) * (n - 2))
    trace = (k * l).sum((1, 2))
    return (trace + mean - 2 / (n - 2) * (rows[0] * rows[1]).sum(1)) / (n * (n - 3))


def cka(
    cross: Float[Tensor, "L M"], own: Float[Tensor, " L"], other: Float[Tensor, " M"]
) -> tuple[Float[Tensor, "L M"], Bool[Tensor, "L M"]]:
    """Alignment from sums of HSIC over minibatches, and where there is none.

    A layer whose own HSIC is not above 0 does not tell images apart, or not reliably from so few:
    its alignment is 0 and marked, never NaN.

    Args:
        cross: of the layers of one network with those of another.
        own: of each layer of the first with itself.
        other: of each layer of the second with itself.
    """
    product = own.clamp(min=0)[:, None] * other.clamp(min=0)
    degenerate = ~(product > 0)
    value = cross / product.where(~degenerate, 1.0).sqrt()
    return value.where(~degenerate, 0.0), degenerate
