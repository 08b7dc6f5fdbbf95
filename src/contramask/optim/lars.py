"""Layer-wise adaptive rate scaling, in the two spellings of its users."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates for parameters of more than one dimension (arXiv:1708.03888).

        u = g + decay w;   u <- eta |w| / |u| u   (if both norms are positive)
        lars:          v <- momentum v + u;         w <- w - lr v      (MoCo v3, MAE)
        lars_classic:  v <- momentum v + lr u;      w <- w - v         (SimCLR)

    One-dimensional parameters get neither decay nor adaptation.
    """

    def __init__(
        self,
        params: Sequence[dict[str, Any]] | Iterable[Tensor],
        *,
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
        classic: bool = False,
    ):
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "eta": eta,
            "classic": classic,
        }
        super().__init__(params, defaults)  # pyright: ignore[reportArgumentType]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    self._move(w, w.grad, group)
        return loss

    def _move(self, w: Tensor, update: Tensor, group: dict[str, Any]) -> None:
        if w.ndim > 1:
            update = update + group["weight_decay"] * w
            weight_norm, update_norm = w.norm(), update.norm()
            ratio = group["eta"] * weight_norm / update_norm
            positive = (weight_norm > 0) & (update_norm > 0)
            update = update * torch.where(positive, ratio, torch.ones_like(ratio))
        state = self.state[w]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(w)
        v = state["momentum_buffer"]
        if group["classic"]:
            w.sub_(v.mul_(group["momentum"]).add_(update, alpha=group["lr"]))
        else:
            w.sub_(v.mul_(group["momentum"]).add_(update), alpha=group["lr"])
