"""Accuracy on the validation set while a classifier is trained, and at the end."""

import sys
import time
from typing import Any

import pytorch_lightning as pl

from contramask.callbacks.cadence import Cadence
from contramask.callbacks.online_probes import clean_data, undisturbed
from contramask.callbacks.telling import tell
from contramask.training.finetuning import FineTuning
from contramask.training.scoring import score
from contramask.types import UserError


class Validation(pl.Callback):
    """Scores all validation images every so many updates, and after the last one.

    Logs `val/top1`, `val/top5`, `val/loss`, with an average of weights also `val/ema_top1` ..., at
    the step they belong to, and `val/seconds`. It comes before the checkpoint of the same step, so
    a run that is stopped there has its row, and one that is continued does not lack it. Training is
    left bitwise as it is. A step inside an accumulation window is never scored.

    Attributes:
        values: the last scores, without `val/`.
        step: after how many updates.

    Args:
        every: updates between two validations; 0: only after the last.
    """

    def __init__(self, every: int = 0):
        if every < 0:
            raise UserError(f"validation every {every} updates; it is at least 0 (only at the end)")
        self._cadence = Cadence(every or sys.maxsize)
        self.values: dict[str, float] = {}
        self.step = -1

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with undisturbed(pl_module.device):
            clean_data(trainer).clean_dataloader("val")  # no validation shards: told now

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._cadence.start(trainer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._cadence.due(trainer):
            assert isinstance(pl_module, FineTuning)
            self._validate(trainer, pl_module)

    def _validate(self, trainer: pl.Trainer, module: FineTuning) -> None:
        start, data, bar = time.perf_counter(), clean_data(trainer), trainer.progress_bar_callback
        if bar is not None:
            bar.on_validation_start(trainer, module)
        with undisturbed(module.device), trainer.precision_plugin.forward_context():
            loader = data.clean_dataloader("val")
            batches = (data.to_device(batch, module.device) for batch in loader)
            found = score(module.nets, batches, module.classifier.classes, module.device)
        self.values, self.step = found, trainer.global_step
        shown = {f"val/{k}": float(v) for k, v in found.items() if k != "images"}
        tell(trainer, module, shown, {"val/seconds": time.perf_counter() - start})
        if bar is not None:
            bar.on_validation_end(trainer, module)

    def state_dict(self) -> dict[str, Any]:
        """The last scores: a run that was stopped after its last update knows them."""
        return {"values": self.values, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.values, self.step = state_dict["values"], state_dict["step"]
