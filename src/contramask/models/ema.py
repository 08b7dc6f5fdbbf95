"""Exponential moving averages of modules: the teachers of self-distillation."""

import copy
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from contramask.errors import UserError, need_one_of

Moved = Literal["before", "after"]


def check_teachers(momentum: object, moved: Moved) -> None:
    """Raise a `UserError` for a constant momentum outside [0, 1] or an unknown moment."""
    need_one_of(moved, Moved, "model: ema", "model.ema")
    if isinstance(momentum, int | float) and not 0 <= momentum <= 1:
        raise UserError(
            f"the teachers' momentum is {momentum}; it is in [0, 1], or a schedule; "
            "set model.momentum"
        )


class EmaCopy(nn.Module):
    """A frozen moving average of `source`, called like it.

    It knows its source, so no list of pairs can forget it: whoever trains walks over all modules
    and updates every `EmaCopy`. Parameters are averaged, buffers are not (MoCo v3, DINO). Dropout
    and drop path stay silent; batch norm follows `train()` and keeps statistics of its own, as in
    MoCo v3 (arXiv:2104.02057): with averaged parameters only, statistics that never move would
    normalise by 0 and 1 for ever.
    """

    def __init__(self, source: nn.Module):
        super().__init__()
        self.module = copy.deepcopy(source).requires_grad_(False)
        self._source = (source,)  # in a tuple: referred to, not registered
        self.train(source.training)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """theta' <- momentum theta' + (1 - momentum) theta."""
        own: list[torch.Tensor] = list(self.module.parameters())
        source: list[torch.Tensor] = list(self._source[0].parameters())
        if not own:  # a copy of something without weights
            return
        # One kernel for all tensors; torch's own optimisers use the same calls.
        torch._foreach_mul_(own, momentum)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(own, source, alpha=1 - momentum)  # pyright: ignore

    def train(self, mode: bool = True) -> "EmaCopy":
        super().train(mode)
        for module in self.module.modules():
            module.training = mode and isinstance(module, _BatchNorm)
        return self
