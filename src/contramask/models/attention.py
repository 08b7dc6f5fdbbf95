"""What a block attended to, computed again from its input: training keeps its fused kernels."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Attended(NamedTuple):
    """One block's attention on one batch."""

    maps: Float[Tensor, "B H T T"]  # after the softmax; a row for each query
    output: Float[Tensor, "B H T d"]  # what each head read, before heads are mixed


def attend(
    attention: nn.Module, x: Float[Tensor, "B T D"], bias: Float[Tensor, "..."] | None = None
) -> Attended:
    """The maps and heads' outputs of timm's `Attention` for its input.

    Args:
        attention: with `qkv`, `q_norm`, `k_norm`, `num_heads` and `scale`.
        x: what it was given.
        bias: added to the scores before the softmax.
    """
    a: Any = attention
    b, t, _ = x.shape
    qkv = a.qkv(x).reshape(b, t, 3, a.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)  # (B, H, T, d)
    scores = (a.q_norm(q) * a.scale) @ a.k_norm(k).mT
    if bias is not None:
        scores += bias
    maps = torch.softmax(scores, -1, dtype=torch.float32)
    return Attended(maps, maps.to(v.dtype) @ v)
