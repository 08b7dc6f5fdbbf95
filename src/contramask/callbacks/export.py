"""Hand out the backbone while training runs, so that others can probe it."""

import logging
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl

from contramask.checkpoints.export import ExportError, export_backbone
from contramask.models.backbone import Backbone
from contramask.training.pretraining import Pretraining
from contramask.types import UserError

log = logging.getLogger(__name__)


class Export(pl.Callback):
    """Writes `backbone.safetensors` and `backbone.yaml` into the run directory.

    Where that fails, on a full disk say, training goes on with a warning, and ends with an error
    if its last weights could not be written.

    Args:
        folder: the run directory; None: the trainer's `default_root_dir`.
        every: steps between exports; the last step exports always.
        net: the student, as MoCo v3 and MAE publish theirs, or the teacher, as DINO does.
        data: `mean`, `std` and `size` of what the backbone is fed.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        every: int = 5000,
        net: Literal["student", "teacher"] = "student",
        data: dict[str, Any] | None = None,
    ):
        self.folder, self.every, self.data = folder, every, data or {}
        self.net: Literal["student", "teacher"] = net
        self._tried = self._written = 0  # the steps of the newest attempt and of the newest file

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.folder = self.folder or Path(trainer.default_root_dir)
        self._backbone(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        # Within an accumulation window the step stays where it is: export once, at its end.
        step = trainer.global_step
        if step % self.every == 0 and step != self._tried:
            problem = self._export(trainer, pl_module)
            if problem:
                log.warning("no export at step %d, training goes on: %s", step, problem)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Also of a run that was killed between its last checkpoint and this, and continued.
        done = trainer.global_step == self._written
        problem = "" if done else self._export(trainer, pl_module)
        # Only the first rank writes, so only it can fail; the others end with it, not after it.
        problem = trainer.strategy.broadcast(problem)
        if problem:
            raise ExportError(
                f"{problem}; the run itself is saved: start the same command again, and it is "
                "exported at its end"
            )

    def _export(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
        """Write, on the first rank; returns what went wrong."""
        self._tried = step = trainer.global_step
        if trainer.is_global_zero and self.folder is not None:
            backbone = self._backbone(pl_module)
            try:
                export_backbone(backbone, self.folder, net=self.net, step=step, data=self.data)
            except ExportError as error:
                return str(error)
        self._written = step
        return ""

    def _backbone(self, pl_module: pl.LightningModule) -> Backbone:
        assert isinstance(pl_module, Pretraining)
        if self.net == "student":
            return pl_module.backbone
        if pl_module.teacher is None:
            raise UserError(
                "export.net is teacher, but no objective reads a teacher pass; set export.net to "
                "student"
            )
        assert isinstance(pl_module.teacher.module, Backbone)
        return pl_module.teacher.module
