"""Targets and losses of self-distillation: centring, Sinkhorn-Knopp, cross-entropy, KoLeo.

All is computed in at least float32, whatever autocast says: at a teacher's temperature of 0.04 a
half-precision exponential overflows.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]


def _same(x: Tensor) -> Tensor:
    return x


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def centred(
    logits: Float[Tensor, "... K"], centre: Float[Tensor, " K"], temperature: float
) -> Float[Tensor, "... K"]:
    """softmax((logits - centre) / temperature): DINO's targets (arXiv:2104.14294, eq. 1 and 4)."""
    return ((_wide(logits) - centre) / temperature).softmax(-1)


@torch.no_grad()
def sinkhorn(
    logits: Float[Tensor, "M K"],
    temperature: float,
    *,
    iterations: int = 3,
    total: Reduce = _same,
    largest: Reduce = _same,
) -> Float[Tensor, "M K"]:
    """Soft assignments that use all K prototypes alike (SwAV, arXiv:2006.09882; DINOv2).

        Q = exp(logits / temperature), over the rows of all ranks
        `iterations` times: each column sums to 1 / K, then each row to 1 / M
        Q <- M Q

    The logarithm of Q is what is computed: it can neither overflow, as exp(logits / temperature)
    does above 88 in float32, nor lose a prototype that is far from every row.

    Args:
        logits: of the teacher; rows of this rank.
        temperature: of the teacher.
        iterations: 3 in SwAV and DINOv2.
        total: sums a tensor over ranks.
        largest: the maximum over ranks, element by element.
    """
    q = _wide(logits) / temperature
    rows = total(q.new_tensor(float(len(q)))).log()
    for _ in range(iterations):
        top = largest(q.amax(0) if len(q) else q.new_full(q.shape[1:], float("-inf")))
        columns = total((q - top).exp().sum(0)).log() + top
        q = q - columns - math.log(q.shape[1])
        q = q - q.logsumexp(1, keepdim=True) - rows
    return (q + rows).exp()


def cross_entropy(
    logits: Float[Tensor, "*M K"], targets: Float[Tensor, "*M K"], temperature: float
) -> Float[Tensor, "*M"]:
    """-sum_k targets_k log softmax(logits / temperature)_k, row by row."""
    return -(targets * (_wide(logits) / temperature).log_softmax(-1)).sum(-1)


def cross_view(
    logits: Float[Tensor, "V B K"],
    targets: Float[Tensor, "G B K"],
    temperature: float,
    *,
    same: bool = False,
) -> Float[Tensor, ""]:
    """Mean cross-entropy over pairs of a teacher's crop and another crop of the student.

        loss = 0
        for g in range(G): for v in range(V): if v != g: loss += mean_b CE(targets[g], logits[v])
        loss /= number of pairs

    Args:
        logits: of the student; its first G crops are those of the teacher.
        targets: of the teacher, rows that sum to 1.
        temperature: of the student.
        same: count the pairs of a crop with itself as well.
    """
    logs = (_wide(logits) / temperature).log_softmax(-1)
    with torch.autocast(logs.device.type, enabled=False):
        pairs = torch.einsum("gbk,vbk->gv", targets.to(logs.dtype), logs) / -logits.shape[1]
    if same:
        return pairs.mean()
    off = ~torch.eye(*pairs.shape, dtype=torch.bool, device=pairs.device)
    return (pairs * off).sum() / (pairs.numel() - min(pairs.shape))


def koleo(x: Float[Tensor, "B D"], eps: float = 1e-8) -> Float[Tensor, ""]:
    """-mean_i log(|x_i - x_n(i)| + eps), n(i) the nearest other row (arXiv:1806.03198, DINOv2).

    Rows are brought to length 1 first. The gradient flows through both rows of a pair.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(_wide(x), dim=-1, eps=eps)
        with torch.no_grad():
            products = x @ x.mT
            nearest = products.fill_diagonal_(-1.0).argmax(1)
        return -(F.pairwise_distance(x, x[nearest], eps=eps) + eps).log().mean()
