"""Pretraining: compute every declared pass once, sum the weighted objectives, move the teachers."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from contramask.masks import Masking
from contramask.models.backbone import Backbone
from contramask.models.ema import EmaCopy, Moved, check_teachers
from contramask.objectives.objective import Objective
from contramask.optim import Optim
from contramask.schedule import Schedule, at
from contramask.training.balance import balance
from contramask.training.clocked import Clocked
from contramask.training.dropout import seed_layers
from contramask.training.encoding import encode
from contramask.training.inspection import draw
from contramask.training.plan import agree, check_depth, check_sizes, describe, plan
from contramask.types import Batch, Loss, Pass, Spec, Step, Tokens


class Pretraining(Clocked):
    """Minimise a weighted sum of objectives on one backbone.

    Contrastive, masked and hybrid pretraining are three configurations of it.

    Args:
        backbone: the encoder that is trained.
        objectives: the terms of the loss by name; each is built for the backbone's sizes.
        optim: optimiser, rates and parameter groups.
        masks: ways of hiding patches by name; objectives name them.
        weights: of the objectives, numbers or schedules; exactly one each. None: all 1.
        momentum: of the teachers, if a pass reads one.
        ema: when the teachers move: `before` the forward of a step (MoCo v3) or `after` the
            update of the weights (DINO, BYOL).
        seed: of masks, dropout and drop path.
        compile: run the networks through torch.compile.
    """

    def __init__(
        self,
        backbone: Backbone,
        objectives: dict[str, Callable[[Spec], Objective]],
        *,
        optim: Optim | None = None,
        masks: dict[str, Callable[[Spec], Masking]] | None = None,
        weights: dict[str, float | Schedule] | None = None,
        momentum: float | Schedule = 0.99,
        ema: Moved = "after",
        seed: int = 0,
        compile: bool = False,
    ):
        super().__init__(optim or Optim(), seed=seed)
        check_teachers(momentum, ema)
        spec = backbone.spec
        self.backbone = backbone
        self.objectives = nn.ModuleDict({k: make(spec) for k, make in objectives.items()})
        self.masks = nn.ModuleDict({k: make(spec) for k, make in (masks or {}).items()})
        self.weights = dict.fromkeys(objectives, 1.0) if weights is None else weights
        self.momentum, self.ema = momentum, ema
        self.plan = plan(self.terms)
        self.teacher = EmaCopy(backbone) if any(p.net == "teacher" for p in self.plan) else None
        check_depth(self.terms, spec)
        agree("weights", self.weights, "objectives", objectives)
        agree("masks", self.masks, "the objectives' masks", {p.mask for p in self.plan if p.mask})
        self._compile, self._networks = compile, {}

    @property
    def terms(self) -> dict[str, Objective]:
        """The objectives by name, with their type."""
        return {k: m for k, m in self.objectives.items() if isinstance(m, Objective)}

    # ---- one step ---------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        step = self.place(batch)
        if self.ema == "before" and step.row < step.rows // self.trainer.accumulate_grad_batches:
            self._move_teachers(step.progress)
        feats, losses = self.encode(batch, step), {}
        for name, term in self.terms.items():
            seed_layers(step, name, self.device)
            losses[name] = term(feats, batch, step)
            for buffer, value in losses[name].state.items():
                term.get_buffer(buffer).copy_(value)
        total = self._sum(losses, step)
        if self.due(step.index):
            self._note(losses, total, step)
        return {"loss": total, "losses": {k: v.value.detach() for k, v in losses.items()}}

    def encode(self, batch: Batch, step: Step) -> dict[Pass, Tokens]:
        """Every pass of the plan, computed once; equal (view, mask) pairs share one mask."""
        return encode(self.plan, self.masks, self._network, batch, step)

    def _sum(self, losses: Mapping[str, Loss], step: Step) -> Tensor:
        # A term of weight 0 is multiplied, not skipped: parameters without gradient stop DDP.
        parts = [at(self.weights[k], step.progress) * v.value for k, v in losses.items()]
        return torch.stack(parts).sum()

    def _network(self, net: str) -> Callable[..., Tokens]:
        # The eager modules stay as they are, for analyses; compiled ones are called in their place.
        if net not in self._networks:
            module = self.backbone if net == "student" else self.teacher
            assert module is not None
            self._networks[net] = torch.compile(module) if self._compile else module
        return self._networks[net]

    def moved(self, progress: float) -> None:
        if self.ema == "after":
            self._move_teachers(progress)

    def _move_teachers(self, progress: float) -> None:
        momentum = at(self.momentum, progress)
        for module in self.modules():
            if isinstance(module, EmaCopy):
                module.update(momentum)

    # ---- what is shown ----------------------------------------------------------------------

    def _note(self, losses: Mapping[str, Loss], total: Tensor, step: Step) -> None:
        shown: dict[str, Tensor | float] = {"train/loss": total}
        for name, loss in losses.items():
            shown[f"train/loss/{name}"] = loss.value
            shown[f"train/weight/{name}"] = at(self.weights[name], step.progress)
            shown |= {f"train/{name}/{k}": v for k, v in loss.logs.items()}
        if self.teacher is not None:
            shown["optim/ema_momentum"] = at(self.momentum, step.progress)
        self.ledger.add(shown)

    @torch.no_grad()
    def inspect(self, batch: Batch, images: int = 8) -> dict[str, dict[str, Tensor]]:
        """Pictures of the first images of a batch: views by group, and what objectives draw.

        Everything is in the normalised space of the views. The caller keeps random states and
        train or eval modes as they were.
        """
        step = Step(self.global_step, self.global_step / self.total_steps, self.seed)
        return draw(self.encode, self.terms, batch, step, images)

    def balance(self, batch: Batch) -> dict[str, Tensor]:
        """How the terms pull at the backbone, see `balance`; empty if there is but one.

        The batch is one that was trained on. The caller keeps random states and buffers.
        """
        if len(self.terms) < 2:
            return {}
        step = self._place(batch)
        weights = {name: at(weight, step.progress) for name, weight in self.weights.items()}
        parameters = self.backbone.parameters()
        return balance(self.encode, self.terms, weights, parameters, batch, step)

    def describe(self) -> str:
        """What will be computed in a step and how many parameters there are, in a few lines."""
        return describe(self.parameters(), self.plan, self.terms)

    def check(self, batch: Batch) -> None:
        """Refuse data the objectives or the backbone cannot use, before the first forward."""
        crops = {name: len(view) for name, view in batch["views"].items()}
        for term in self.terms.values():
            term.check(crops, len(batch["label"]))
        sizes = {name: tuple(view.shape[-2:]) for name, view in batch["views"].items()}
        check_sizes(self.plan, sizes, self.backbone.spec)
