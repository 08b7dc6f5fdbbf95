"""Pretraining: compute every declared pass once, sum the weighted objectives, move the teachers."""

from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from contramask.masks import Masking
from contramask.models.backbone import Backbone
from contramask.models.ema import EmaCopy, Moved, check_teachers
from contramask.objectives.objective import Objective
from contramask.optim import Optim
from contramask.schedule import Schedule, at
from contramask.training.balance import balance
from contramask.training.dropout import seed_layers
from contramask.training.encoding import encode
from contramask.training.inspection import draw
from contramask.training.ledger import Ledger
from contramask.training.plan import agree, check_depth, check_length, check_sizes, describe, plan
from contramask.types import Batch, Loss, Pass, Spec, Step, Tokens, UserError


class Pretraining(pl.LightningModule):
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
        super().__init__()
        check_teachers(momentum, ema)
        spec = backbone.spec
        self.backbone = backbone
        self.objectives = nn.ModuleDict({k: make(spec) for k, make in objectives.items()})
        self.masks = nn.ModuleDict({k: make(spec) for k, make in (masks or {}).items()})
        self.weights = dict.fromkeys(objectives, 1.0) if weights is None else weights
        self.optim, self.momentum, self.ema, self.seed = optim or Optim(), momentum, ema, seed
        self.plan = plan(self.terms)
        self.teacher = EmaCopy(backbone) if any(p.net == "teacher" for p in self.plan) else None
        check_depth(self.terms, spec)
        agree("weights", self.weights, "objectives", objectives)
        agree("masks", self.masks, "the objectives' masks", {p.mask for p in self.plan if p.mask})
        self._compile, self._networks = compile, {}
        self._images: int | None = None  # of a micro-batch on one rank
        self._ledger = Ledger()

    @property
    def terms(self) -> dict[str, Objective]:
        """The objectives by name, with their type."""
        return {k: m for k, m in self.objectives.items() if isinstance(m, Objective)}

    # ---- one step ---------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Before the first forward, and before the first rates: they need the size of a batch.
        if self._images is None:
            self._check(batch)

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
        if self._due(step.index):
            self._note(losses, total, step)
        return {"loss": total, "losses": {k: v.value.detach() for k, v in losses.items()}}

    def encode(self, batch: Batch, step: Step) -> dict[Pass, Tokens]:
        """Every pass of the plan, computed once; equal (view, mask) pairs share one mask."""
        return encode(self.plan, self.masks, self._network, batch, step)

    def place(self, batch: Batch) -> Step:
        """Where this micro-batch stands, from its position in the stream and nothing else."""
        step = self._place(batch)
        if self.training and step.index != self.global_step:
            raise RuntimeError(
                f"the stream is at step {step.index} (position {batch['position']}), training at "
                f"{self.global_step}: the loader did not start where the checkpoint stopped"
            )
        return step

    def _place(self, batch: Batch) -> Step:
        images = len(batch["label"])
        rows = images * self.trainer.world_size * self.trainer.accumulate_grad_batches
        index, row = divmod(batch["position"], rows)
        return Step(index, index / self.total_steps, self.seed, row, rows)

    @property
    def total_steps(self) -> int:
        """Weight updates of the whole training, the unit of all schedules."""
        return check_length(self.trainer.max_steps)

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

    # ---- the clock --------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optim.build(self.named_parameters(), fused=True)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """One tick: write the rates, move the weights, move the teachers."""
        progress = self.global_step / self.total_steps
        lr = self.optim.set(optimizer, progress, self.global_batch)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.ema == "after":
            self._move_teachers(progress)
        if self._due(self.global_step):
            decay = at(self.optim.decay, progress)
            self._ledger.add({"optim/lr": lr, "optim/weight_decay": decay})
            self._report()

    @property
    def global_batch(self) -> int:
        """Images of one update, over ranks and accumulated micro-batches."""
        assert self._images is not None
        return self._images * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the recipe says and log the norm before clipping."""
        if gradient_clip_val is not None:
            raise UserError(
                f"trainer.gradient_clip_val is {gradient_clip_val}; clipping is part of the "
                "recipe: set model.optim.clip instead"
            )
        if self._due(self.global_step):
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            self._ledger.add({"optim/grad_norm": nn.utils.get_total_norm(gradients)})
        self.optim.shorten(self.named_parameters(), self.global_step / self.total_steps)

    def _move_teachers(self, progress: float) -> None:
        momentum = at(self.momentum, progress)
        for module in self.modules():
            if isinstance(module, EmaCopy):
                module.update(momentum)

    # ---- what is shown ----------------------------------------------------------------------

    def _due(self, index: int) -> bool:
        every: int = self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        return (index + 1) % every == 0

    def _note(self, losses: Mapping[str, Loss], total: Tensor, step: Step) -> None:
        shown: dict[str, Tensor | float] = {"train/loss": total}
        for name, loss in losses.items():
            shown[f"train/loss/{name}"] = loss.value
            shown[f"train/weight/{name}"] = at(self.weights[name], step.progress)
            shown |= {f"train/{name}/{k}": v for k, v in loss.logs.items()}
        if self.teacher is not None:
            shown["optim/ema_momentum"] = at(self.momentum, step.progress)
        self._ledger.add(shown)

    def _report(self) -> None:
        shown = self._ledger.close(self.device)
        self.log_dict(shown, logger=False, batch_size=1)  # for callbacks
        # Not by way of the trainer: it tells loggers after a checkpoint was written, and a run that
        # is stopped there would lack this row for ever.
        for logger in self.trainer.loggers:
            logger.log_metrics(shown, step=self.global_step + 1)  # updates done

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

    def _check(self, batch: Batch) -> None:
        """Refuse data the objectives or the backbone cannot use, before the first forward."""
        crops = {name: len(view) for name, view in batch["views"].items()}
        for term in self.terms.values():
            term.check(crops, len(batch["label"]))
        sizes = {name: tuple(view.shape[-2:]) for name, view in batch["views"].items()}
        check_sizes(self.plan, sizes, self.backbone.spec)
        self._images = len(batch["label"])
