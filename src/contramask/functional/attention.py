"""What attention maps look at: how far, how sharply, how much of the query they depend on.

Definitions of Park et al., 2023 (arXiv:2305.00729), as in the authors' published notebooks. Maps
are (B, H, Q, K): images, heads, queries, keys; statistics are (B, H).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

# What is added before maps are renormalised over patches; the authors' numbers hold with these.
DISTANCE_EPS, NMI_EPS = 1e-32, 1e-8


def among_patches(
    attention: Float[Tensor, "B H T T"], prefix: int, eps: float = 0.0
) -> Float[Tensor, "B H N N"]:
    """Attention of patches to patches: class token and registers dropped, rows sum to 1 again.

    Args:
        attention: of all tokens, after the softmax.
        prefix: tokens in front that are no patches.
        eps: added to every entry before rows are divided by their sum.
    """
    kept = attention[:, :, prefix:, prefix:] + eps
    return kept / kept.sum(-1, keepdim=True)


def pixel_distances(
    grid: tuple[int, int], patch: int, device: torch.device | None = None
) -> Float[Tensor, "N N"]:
    """Distances of the middles of every two patches, in pixels."""
    axes = [torch.arange(n, dtype=torch.float64, device=device) for n in grid]
    place = torch.cartesian_prod(*axes)
    return patch * torch.cdist(place, place, compute_mode="donot_use_mm_for_euclid_dist")


def distance(
    attention: Float[Tensor, "B H N N"], grid: tuple[int, int], patch: int
) -> Float[Tensor, "B H"]:
    """Mean distance in pixels between a patch and what it attends to (section 3.1)."""
    far = pixel_distances(grid, patch, attention.device)
    return (attention * far.to(attention)).sum((-2, -1)).to(far) / attention.shape[2]


def entropy(attention: Float[Tensor, "B H N N"]) -> Float[Tensor, "B H"]:
    """Mean entropy of a query's map in nats: 0 for one key, log N for all alike."""
    return entropies(attention).mean(-1)


def mutual_information(
    attention: Float[Tensor, "B H N N"], known: Float[Tensor, "B H N"] | None = None
) -> Float[Tensor, "B H"]:
    """Normalised mutual information of query and key, queries uniform (section 3.1).

    I(q, k) / sqrt(H(q) H(k)) with I(q, k) = H(k) - H(k | q). 0: all queries attend alike,
    attention has collapsed.

    Args:
        attention: rows sum to 1.
        known: `entropies` of the maps, if they are at hand.
    """
    each = entropies(attention) if known is None else known
    # The difference of two nearly equal numbers: float64 where it costs nothing.
    key = entropies(attention.mean(2, dtype=torch.float64))
    information = (key - each.double().mean(-1)).clamp(min=0)
    product = (math.log(attention.shape[2]) * key).clamp(min=torch.finfo(key.dtype).tiny)
    return (information / product.sqrt()).to(attention)


def entropies(p: Float[Tensor, "*b K"]) -> Float[Tensor, "*b"]:
    """-sum p log p, with 0 log 0 = 0. Faster on a CPU than `torch.special.entr`."""
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(-1)


def diversity(attention: Float[Tensor, "B H N N"]) -> Float[Tensor, "B H"]:
    """1 - mean cosine of the maps of two queries. 0: all attend alike (arXiv:2403.02233)."""
    unit = torch.nn.functional.normalize(attention, dim=-1)
    count = attention.shape[2]
    total = unit.sum(2).square().sum(-1)  # over all pairs, each with itself among them
    return 1 - (total - count) / (count * (count - 1))


def head_similarity(attention: Float[Tensor, "B H N N"]) -> Float[Tensor, " B"]:
    """Mean cosine of the same query's maps in two heads; 0 where there is but one head."""
    unit = torch.nn.functional.normalize(attention, dim=-1)
    heads = attention.shape[1]
    total = unit.sum(1).square().sum(-1).mean(-1)
    return (total - heads) / max(heads * (heads - 1), 1)


def to_prefix(attention: Float[Tensor, "B H T T"], prefix: int) -> Float[Tensor, "B H P"]:
    """Mean attention of patches to each token that is no patch: class token, then registers."""
    return attention[:, :, prefix:, :prefix].mean(2)
