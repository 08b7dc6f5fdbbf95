"""Optimisers, parameter groups by first-match rules, and rates that are written at every step."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from contramask.errors import UserError, need_one_of
from contramask.optim.clipping import Clip
from contramask.optim.lars import LARS
from contramask.schedule import Schedule, at

Name = Literal["adamw", "sgd", "lars", "lars_classic"]
Scaling = Literal["linear", "sqrt"]
FreezeBy = Literal["skip", "rate"]

# What comes before the first block: patches, positions, tokens, and what masks put in their place.
FIRST = r"patch_embed|pos_embed|cls_token|reg_token|^masks\."


@dataclass(frozen=True)
class Rule:
    """Factors for the parameters it matches. The first matching rule of a list decides.

    Attributes:
        pattern: a regular expression searched for in the parameter's full name.
        ndim: matches parameters of at most this many dimensions; 1: biases, norms, scales.
        lr: factor of the learning rate.
        decay: factor of the weight decay; 0 exempts.
        freeze: fraction of training, from its start, in which the parameters do not move.
        freeze_by: how: `skip`, the optimiser does not see their gradients (DINO, iBOT: no decay,
            no moments), or `rate`, their learning rate is 0 (DINOv2: moments gather).
    """

    pattern: str = ""
    ndim: int | None = None
    lr: float = 1.0
    decay: float = 1.0
    freeze: float = 0.0
    freeze_by: FreezeBy = "skip"

    def __post_init__(self) -> None:
        need_one_of(self.freeze_by, FreezeBy, "optim rule: freeze_by", "model.optim.rules")

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
        batch: the batch the learning rate is meant for; it is scaled to the actual global batch.
            None: the rate as it is.
        scaling: `linear` in the batch (arXiv:1706.02677) or with its square root, `sqrt` (DINOv2).
        decay: weight decay.
        betas: of AdamW; the first is the momentum of SGD and LARS.
        rules: factors per parameter; parameters without a matching rule have factors 1.
            `[{ndim: 1, decay: 0}]` exempts biases and norms from decay, as most methods do.
        layer_decay: the rate of block i of L (from 0) is multiplied by layer_decay^(L - i), that of
            what comes before the first block by layer_decay^(L + 1), all else stays (BEiT,
            arXiv:2106.08254; MAE counts the head as a layer and means the same). The factors of
            the rules come on top.
        clip: largest norm of the gradient of all parameters together, or a `Clip`; None: none.
    """

    name: Name = "adamw"
    lr: float | Schedule = 1.5e-4
    batch: int | None = 256
    scaling: Scaling = "linear"
    decay: float | Schedule = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    rules: list[Rule] = field(default_factory=list)
    layer_decay: float = 1.0
    clip: float | Clip | None = None

    def __post_init__(self) -> None:
        need_one_of(self.name, Name, "optim: name", "model.optim.name")
        need_one_of(self.scaling, Scaling, "optim: scaling", "model.optim.scaling")

    def groups(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        """Parameter groups of equal factors, with the names of their members.

        Raises:
            UserError: for a rule that matches nothing: most often a misspelt pattern.
        """
        groups: dict[tuple[float, ...], dict[str, Any]] = {}
        used: set[int] = set()
        trained = [(n, p) for n, p in parameters if p.requires_grad]
        blocks = 1 + max((_block(n) for n, _ in trained), default=-1)
        for name, parameter in trained:
            index, rule = self._decide(name, parameter)
            used |= {index}
            factor = rule.lr * self._of_layer(name, blocks)
            frozen = rule.freeze if rule.freeze_by == "rate" else 0.0
            group = groups.setdefault(
                (factor, rule.decay, frozen),
                {
                    "params": [],
                    "names": [],
                    "lr_factor": factor,
                    "decay_factor": rule.decay,
                    "blocks": blocks,
                },
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

    def _of_layer(self, name: str, blocks: int) -> float:
        """The factor of the learning rate that belongs to a parameter's depth."""
        if self.layer_decay == 1.0 or not name.startswith(("backbone.", "masks.")):
            return 1.0
        block = _block(name)
        if block < 0 and not re.search(FIRST, name):
            return 1.0
        return self.layer_decay ** (blocks - block)

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
        size = batch / self.batch if self.batch else 1.0
        lr = at(self.lr, progress) * (size if self.scaling == "linear" else math.sqrt(size))
        decay = at(self.decay, progress)
        for group in optimizer.param_groups:
            name = group["names"][0]
            _, rule = self._decide(name, group["params"][0])
            factor = rule.lr * self._of_layer(name, group["blocks"])
            group["lr_factor"], group["decay_factor"] = factor, rule.decay
            still = rule.freeze_by == "rate" and progress < rule.freeze
            group["lr"], group["weight_decay"] = 0.0 if still else lr * factor, decay * rule.decay
            if "betas" in group:
                group["betas"] = self.betas
            else:
                group["momentum"] = self.betas[0]
        return lr

    def shorten(self, parameters: Iterable[tuple[str, nn.Parameter]], progress: float) -> None:
        """Clip the gradients, then take away those of parameters that do not move yet.

        Args:
            parameters: by name, with the gradients of an update.
            progress: fraction of training done.
        """
        named = [(n, p) for n, p in parameters if p.grad is not None]
        if self.clip is not None:
            clip = self.clip if isinstance(self.clip, Clip) else Clip(self.clip)
            clip(named)
        if not any(r.freeze_by == "skip" and progress < r.freeze for r in self.rules):
            return
        for name, parameter in named:
            _, rule = self._decide(name, parameter)
            if rule.freeze_by == "skip" and progress < rule.freeze:
                parameter.grad = None


def _block(name: str) -> int:
    """The number of the backbone's block a parameter is in; -1 outside."""
    # `bias.<i>` is the table of relative positions of block i, where each block has its own.
    found = re.search(r"^backbone\.(?:(?:\w+\.)*?blocks|bias)\.(\d+)\.", name)
    return int(found[1]) if found else -1
