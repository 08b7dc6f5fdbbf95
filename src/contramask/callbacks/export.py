"""Hand out the backbone while training runs, so that others can probe it."""

from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl

from contramask.checkpoints.export import export_backbone
from contramask.models.backbone import Backbone
from contramask.training.pretraining import Pretraining
from contramask.types import UserError


class Export(pl.Callback):
    """Writes `backbone.safetensors` and `backbone.yaml` into the run directory.

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
        self._last = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.folder = self.folder or Path(trainer.default_root_dir)
        self._backbone(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        # Within an accumulation window the step stays where it is: export once, at its end.
        if trainer.global_step % self.every == 0 and trainer.global_step != self._last:
            self._export(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Also of a run that was killed between its last checkpoint and this, and continued.
        if trainer.global_step != self._last:
            self._export(trainer, pl_module)

    def _export(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = trainer.global_step
        if trainer.is_global_zero and self.folder is not None:
            backbone = self._backbone(pl_module)
            step = trainer.global_step
            export_backbone(backbone, self.folder, net=self.net, step=step, data=self.data)

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
