"""Contrastive losses as pure functions of features; gathering over ranks is left to the caller."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def _logits(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    # Autocast would multiply in bfloat16, whose 8 bits move the gradient by 1 % at temperature 0.1.
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return x.to(wide) @ y.to(wide).mT / temperature


def infonce(
    queries: Float[Tensor, "B D"],
    keys: Float[Tensor, "M D"],
    temperature: float,
    offset: int = 0,
) -> Float[Tensor, ""]:
    """-mean_i log softmax_j(q_i . k_j / temperature) at j = i + offset (arXiv:1807.03748, eq. 4).

    Features are expected on the unit sphere. `offset` is the row of this rank's first key among
    the keys of all ranks. Everything is computed in at least float32, also under autocast.
    """
    logits = _logits(queries, keys, temperature)
    return F.cross_entropy(logits, torch.arange(len(queries), device=logits.device) + offset)


def nt_xent(
    a: Float[Tensor, "B D"],
    b: Float[Tensor, "B D"],
    all_a: Float[Tensor, "M D"],
    all_b: Float[Tensor, "M D"],
    temperature: float,
    offset: int = 0,
) -> Float[Tensor, ""]:
    """SimCLR's loss (arXiv:2002.05709, eq. 1) as its authors' code scales it.

    Every image of one view looks for its other view among the other views of all images and the
    same view of all *other* images. The result is mean_i l(a_i) + mean_i l(b_i): twice the mean
    over the 2 M anchors that most reimplementations return.

    Args:
        a: first views of this rank, on the unit sphere.
        b: second views.
        all_a: first views of all ranks, with gradient.
        all_b: second views of all ranks.
        temperature: of the softmax; 0.1 on ImageNet, 0.5 on CIFAR-10 in the paper.
        offset: the row of this rank's first image in `all_a`.
    """
    rows = torch.arange(len(a), device=a.device)
    target = rows + offset

    def one_way(x: Tensor, other: Tensor, same: Tensor) -> Tensor:
        across, within = _logits(x, other, temperature), _logits(x, same, temperature)
        within = within.index_put((rows, target), within.new_tensor(float("-inf")))  # itself
        return F.cross_entropy(torch.cat([across, within], 1), target)

    return one_way(a, all_b, all_a) + one_way(b, all_a, all_b)
