"""The clock of a training: where it stands, rates at every update, clipping, numbers by update."""

from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from contramask.optim import Optim
from contramask.schedule import at
from contramask.training.ledger import Ledger
from contramask.training.plan import check_length
from contramask.types import Batch, Step, UserError


class Clocked(pl.LightningModule):
    """A module whose rates, draws and places are functions of the updates done.

    A subclass has `training_step`, which asks `place` where it is, and adds what it wants shown of
    an update for which `due` holds to `ledger`.

    Args:
        optim: optimiser, rates and parameter groups.
        seed: of all draws in the module.
    """

    def __init__(self, optim: Optim, *, seed: int = 0):
        super().__init__()
        self.optim, self.seed = optim, seed
        self.ledger = Ledger()
        self._images: int | None = None  # of a micro-batch on one rank

    # ---- what a subclass may say ------------------------------------------------------------

    def trained(self) -> Iterable[tuple[str, nn.Parameter]]:
        """The parameters by the names that rules and layer-wise decay go by."""
        return self.named_parameters()

    def check(self, batch: Batch) -> None:
        """Refuse data that cannot be used, before the first forward."""

    def moved(self, progress: float) -> None:
        """The weights have moved: averages follow them."""

    # ---- where training is ------------------------------------------------------------------

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Before the first forward, and before the first rates: they need the size of a batch.
        if self._images is None:
            self.check(batch)
            self._images = len(batch["label"])

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

    @property
    def global_batch(self) -> int:
        """Images of one update, over ranks and accumulated micro-batches."""
        assert self._images is not None
        return self._images * self.trainer.world_size * self.trainer.accumulate_grad_batches

    # ---- an update --------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optim.build(self.trained(), fused=True)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """One tick: write the rates, move the weights, and what follows them."""
        progress = self.global_step / self.total_steps
        lr = self.optim.set(optimizer, progress, self.global_batch)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.moved(progress)
        if self.due(self.global_step):
            decay = at(self.optim.decay, progress)
            self.ledger.add({"optim/lr": lr, "optim/weight_decay": decay})
            self._report()

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
        if self.due(self.global_step):
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            self.ledger.add({"optim/grad_norm": nn.utils.get_total_norm(gradients)})
        self.optim.shorten(self.trained(), self.global_step / self.total_steps)

    # ---- what is shown ----------------------------------------------------------------------

    def due(self, index: int) -> bool:
        """Whether the numbers of update `index` (from 0) are shown."""
        every: int = self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        return bool(every) and (index + 1) % every == 0

    def _report(self) -> None:
        shown = self.ledger.close(self.device)
        self.log_dict(shown, logger=False, batch_size=1)  # for callbacks
        # Not by way of the trainer: it tells loggers after a checkpoint was written, and a run that
        # is stopped there would lack this row for ever.
        for logger in self.trainer.loggers:
            logger.log_metrics(shown, step=self.global_step + 1)  # updates done
