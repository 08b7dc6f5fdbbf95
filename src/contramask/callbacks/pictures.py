"""What the networks are shown and what they make of it, as pictures now and then."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pytorch_lightning as pl
import torch
from torch import Tensor

from contramask.callbacks.cadence import Cadence
from contramask.callbacks.online_probes import undisturbed
from contramask.probes.features import frozen
from contramask.tracking.wandb import Tracker
from contramask.types import Batch, UserError

log = logging.getLogger(__name__)


@runtime_checkable
class Inspectable(Protocol):
    """A training module that can show what it sees, in the normalised space of the views."""

    def inspect(self, batch: Batch, images: int) -> Mapping[str, Mapping[str, Tensor]]: ...


class Pictures(pl.Callback):
    """Draws the views of the training batch at hand, and what the objectives show of them.

    Writes `views-step-00001000.jpg` and one file an objective, and sends them to W&B. No data are
    read for it, and training is bitwise the same with it and without it. Rank 0 alone draws.

    Args:
        folder: where; None: `pictures` in the trainer's `default_root_dir`.
        every: updates between two drawings; 0: never. The first update is drawn as well.
        images: how many of the batch.
    """

    def __init__(self, folder: str | Path | None = None, *, every: int = 2000, images: int = 8):
        if every < 0 or images < 1:
            raise UserError(
                f"pictures: every is {every} and images is {images}; every is at least 0 updates "
                "(0: never), images at least 1; set pictures.every and pictures.images"
            )
        self.folder = None if folder is None else Path(folder)
        self.every, self.images = every, images
        self._cadence = Cadence(every, first=True)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Claim the folder."""
        self.folder = self.folder or Path(trainer.default_root_dir) / "pictures"
        if self.every and not isinstance(pl_module, Inspectable):
            raise UserError(
                f"pictures: {type(pl_module).__name__} has no inspect(batch, images); allowed are "
                "modules that have, such as Pretraining; set pictures.every: 0"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Know where training begins."""
        self._cadence.start(trainer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Draw, if it is time and a weight update is done."""
        if not self._cadence.due(trainer) or not trainer.is_global_zero:
            return
        step = trainer.global_step
        shown = self._inspect(trainer, pl_module, batch)
        written = {f"pictures/{name}": self._draw(name, rows, step) for name, rows in shown.items()}
        paths = {key: path for key, path in written.items() if path is not None}
        for logger in trainer.loggers:
            if isinstance(logger, Tracker) and paths:
                logger.log_pictures(paths, step=step)

    def _inspect(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch
    ) -> dict[str, dict[str, Tensor]]:
        """Pictures in [0, 1] by name and row, on the host."""
        assert isinstance(pl_module, Inspectable)
        with (
            undisturbed(pl_module.device),
            frozen(pl_module),
            torch.compiler.set_stance("force_eager"),  # a few images are no reason to compile
            trainer.precision_plugin.forward_context(),
        ):
            shown = pl_module.inspect(batch, self.images)
        back = _denormalise(trainer)
        return {k: {r: back(x[: self.images]) for r, x in v.items()} for k, v in shown.items()}

    def _draw(self, name: str, rows: Mapping[str, Tensor], step: int) -> Path | None:
        from contramask.report.figures import image_grid  # a second to import: on rank 0 alone

        assert self.folder is not None
        path = self.folder / f"{name}-step-{step:08d}.jpg"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            image_grid(rows, path)
        except OSError as error:  # a full disk: pictures are not worth a run
            log.warning("no picture %s: %s", path, error)
            return None
        return path


def _denormalise(trainer: Any) -> Any:
    """From the normalised space of the data module's views to [0, 1]."""
    images = getattr(getattr(trainer, "datamodule", None), "images", None)

    def back(x: Tensor) -> Tensor:
        x = x.detach().float().cpu()
        if images is not None:
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (images.mean, images.std))
            x = x * std + mean
        return x.clamp(0, 1)

    return back
