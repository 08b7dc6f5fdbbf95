"""Channels of high variance (Vanyan et al., 2024, arXiv:2401.00463).

A few hundred channels of an MAE hold most of the variance and little of what tasks need; who
compares features without normalising them compares those channels.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from contramask.types import UserError


def profile(variance: Float[Tensor, "*L D"]) -> Float[Tensor, "*L D"]:
    """Each channel's share of the total variance, largest first.

    1 / D everywhere where channels are alike; 0 everywhere where nothing varies.
    """
    ordered = variance.sort(dim=-1, descending=True).values
    return ordered / ordered.sum(-1, keepdim=True).clamp(min=torch.finfo(ordered.dtype).tiny)


def top_share(variance: Float[Tensor, "*L D"], m: int) -> Float[Tensor, "*L"]:
    """The share of the total variance in the m channels that vary most; 0 where nothing varies.

    Raises:
        UserError: for an m outside 0..D.
    """
    _check(m, variance.shape[-1])
    return profile(variance)[..., :m].sum(-1)


def top_channels(variance: Float[Tensor, "*L D"], m: int) -> Int[Tensor, "*L m"]:
    """Where the m channels are that vary most, largest first; of equals the lower index.

    Raises:
        UserError: for an m outside 0..D.
    """
    _check(m, variance.shape[-1])
    return variance.sort(dim=-1, descending=True, stable=True).indices[..., :m]


def overlap(first: Int[Tensor, "*L m"], second: Int[Tensor, "*L n"]) -> Int[Tensor, "*L"]:
    """How many channels two sets have in common.

    Sets drawn at random from D channels share m n / D in the mean. A set names a channel once.
    """
    return (first[..., :, None] == second[..., None, :]).any(-1).sum(-1)


def _check(m: int, dim: int) -> None:
    if not 0 <= m <= dim:
        raise UserError(f"channels of high variance: m is {m}; of {dim} it is in 0..{dim}; set m")
