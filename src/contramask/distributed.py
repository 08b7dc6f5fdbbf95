"""Ranks: each function does nothing when alone, so nobody asks whether training is distributed."""

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

_alone: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Generator[None]:
    """One rank does something by itself: inside, there are no others to wait for."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def world() -> int:
    """The number of ranks."""
    if _alone.get():
        return 1
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this rank, from 0."""
    if _alone.get():
        return 0
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def gather(x: Shaped[Tensor, "B ..."]) -> Shaped[Tensor, "WB ..."]:
    """Rows of all ranks in rank order, without gradient. Every rank must bring equally many."""
    if world() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    """Backward sums what every rank wants of this rank's rows.

    torch's own differentiable all_gather is deprecated since 2.13, so this is its one door.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]  # pyright: ignore[reportAttributeAccessIssue]
        return gather(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        # A copy: what autograd hands over may also be on its way to somebody else.
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        rows: int = ctx.rows  # pyright: ignore[reportAttributeAccessIssue]
        return grad[rank() * rows : (rank() + 1) * rows]


def gather_with_gradient(x: Float[Tensor, "B ..."]) -> Float[Tensor, "WB ..."]:
    """Rows of all ranks in rank order; the gradient of every rank's loss flows back to their owner.

    The gradient is the sum over ranks; with DDP's mean of parameter gradients the result is the
    gradient of the mean of the ranks' losses, as in one process with the whole batch.
    """
    return _Gather.apply(x) if world() > 1 else x  # pyright: ignore[reportReturnType]


@torch.no_grad()
def total(x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """The sum over ranks, without gradient."""
    summed = x.detach().clone()
    if world() > 1:
        dist.all_reduce(summed)
    return summed


@torch.no_grad()
def largest(x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """The largest over ranks, element by element, without gradient."""
    top = x.detach().clone()
    if world() > 1:
        dist.all_reduce(top, op=dist.ReduceOp.MAX)
    return top


@torch.no_grad()
def mean(x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """The mean over ranks, without gradient."""
    return total(x) / world()
