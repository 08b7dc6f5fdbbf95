"""Optimisers, parameter groups by first-match rules, and rates that are written at every step."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from contramask.schedule import Schedule, at
from contramask.types import UserError


@dataclass(frozen=True)
class Rule:
    """Factors for the parameters it matches. The first matching rule of a list decides.

    Attributes:
        pattern: a regular expression searched for in the parameter's full name.
        ndim: matches parameters of at most this many dimensions; 1: biases, norms, scales.
        lr: factor of the learning rate.
        decay: factor of the weight decay; 0 exempts.
    """

    pattern: str = ""
    ndim: int | None = None
    lr: float = 1.0
    decay: float = 1.0

    def matches(self, name: str, parameter: Tensor) -> bool:
        """Whether it decides about this parameter."""
        if self.ndim is not None and parameter.ndim > self.ndim:
            return False
        return re.search(self.pattern, name) is not None


@dataclass(frozen=True)
class Optim:
    """How weights move.

    Attributes:
        name: `adamw`, `sgd` (with momentum betas[0]), or `lars` in its two spellings: `lars`, the
            learning rate outside the momentum buffer (MoCo v3, MAE), and `lars_classic`, inside
            it (SimCLR).
        lr: the learning rate, for a global batch of `batch` images.
        batch: the batch the learning rate is meant for; it is scaled linearly to the actual
            global batch (arXiv:1706.02677). None: the rate as it is.
        decay: weight decay.
        betas: of AdamW; the first is the momentum of SGD and LARS.
        rules: factors per parameter; parameters without a matching rule have factors 1.
            `[{ndim: 1, decay: 0}]` exempts biases and norms from decay, as most methods do.
        clip: largest norm of the gradient of all parameters together; None: not clipped.
    """

    name: Literal["adamw", "sgd", "lars", "lars_classic"] = "adamw"
    lr: float | Schedule = 1.5e-4
    batch: int | None = 256
    decay: float | Schedule = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    rules: list[Rule] = field(default_factory=list)
    clip: float | None = None

    def groups(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        """Parameter groups of equal factors, with the names of their members.

        Raises:
            UserError: for a rule that matches nothing: most often a misspelt pattern.
        """
        groups: dict[tuple[float, float], dict[str, Any]] = {}
        used: set[int] = set()
        for name, parameter in parameters:
            if not parameter.requires_grad:
                continue
            index, rule = self._decide(name, parameter)
            used |= {index}
            group = groups.setdefault(
                (rule.lr, rule.decay),
                {"params": [], "names": [], "lr_factor": rule.lr, "decay_factor": rule.decay},
            )
            group["params"].append(parameter)
            group["names"].append(name)
        for i in set(range(len(self.rules))) - used:
            raise UserError(
                f"optim rule {i} ({self.rules[i].pattern!r}) matches no parameter that an earlier "
                "rule does not; see the names in the printed summary; set model.optim.rules"
            )
        return list(groups.values())

    def _decide(self, name: str, parameter: Tensor) -> tuple[int, Rule]:
        for i, rule in enumerate(self.rules):
            if rule.matches(name, parameter):
                return i, rule
        return -1, Rule()

    def build(
        self, parameters: Iterable[tuple[str, nn.Parameter]], *, fused: bool
    ) -> torch.optim.Optimizer:
        """The optimiser; its rates are placeholders until `set` writes them."""
        groups = self.groups(parameters)
        if self.name == "adamw":
            return torch.optim.AdamW(groups, lr=0.0, betas=self.betas, fused=fused)
        if self.name == "sgd":
            return torch.optim.SGD(groups, lr=0.0, momentum=self.betas[0], fused=fused)
        classic = self.name == "lars_classic"
        return LARS(groups, lr=0.0, momentum=self.betas[0], classic=classic)

    def set(self, optimizer: torch.optim.Optimizer, progress: float, batch: int) -> float:
        """Write the rates of this moment into every group; returns the learning rate.

        Rates, factors and momenta come from the configuration at every step: a resumed optimiser
        brings its old ones back, and a changed configuration would be ignored in silence.

        Args:
            optimizer: made by `build`.
            progress: fraction of training done.
            batch: images of one update over all ranks and accumulated micro-batches.
        """
        lr = at(self.lr, progress) * (batch / self.batch if self.batch else 1.0)
        decay = at(self.decay, progress)
        for group in optimizer.param_groups:
            _, rule = self._decide(group["names"][0], group["params"][0])
            group["lr_factor"], group["decay_factor"] = rule.lr, rule.decay
            group["lr"], group["weight_decay"] = lr * rule.lr, decay * rule.decay
            if "betas" in group:
                group["betas"] = self.betas
            else:
                group["momentum"] = self.betas[0]
        return lr


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
