"""Says in plain language when a training has collapsed, stands still or is unstable."""

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from contramask import distributed
from contramask.callbacks.baselines import constant_losses, facts, largest_view, pooled, spread
from contramask.callbacks.cadence import Cadence
from contramask.callbacks.checkpoint import Checkpoints
from contramask.callbacks.diagnoses import FEATURE_STD, GRADIENT, NMI, RANKME, rules
from contramask.callbacks.history import Chart, Diagnosis, History
from contramask.callbacks.online_probes import undisturbed
from contramask.probes.features import frozen
from contramask.tracking.wandb import Tracker
from contramask.training.pretraining import Pretraining
from contramask.types import Batch, UserError

log = logging.getLogger(__name__)

LOGGED = ("train/", GRADIENT)  # by the module, at every logged step
FOREIGN = (RANKME, FEATURE_STD, NMI)  # by analyses, when they are due


class Watchdog(pl.Callback):
    """Looks now and then whether a training has collapsed, and tells it once.

    It reads the numbers that are logged anyway (losses, entropies of a teacher's codes, gradient
    norms, those of analyses), and measures how wide the student's features of the batch at hand
    spread. Rules (`contramask.callbacks.diagnoses`) make diagnoses of them, each with its reason
    and what the field does about it. A diagnosis is told when it sets in and when it ends: in the
    log, as an alert of W&B, and as a line of `diagnoses.jsonl`. At every look the loggers get
    `watchdog/NAME`, 1 while it stands and else 0, and what was measured: `watchdog/std`,
    `watchdog/effective_rank`, `watchdog/chance/TERM`.

    Training is bitwise the same with it and without it, and a resumed run tells the same as one
    that was not stopped. Ranks measure their own images and take the mean, so they agree.

    Args:
        folder: of `diagnoses.jsonl`; None: no file.
        every: updates between two looks; 0: never. The first and the last update are looked at too.
        images: of the batch of a rank, at most, whose features are measured.
        warmup: the fraction of training in which features and losses are not judged, as they are
            not settled.
        stop: end training when a collapse sets in, as if `max_steps` were reached. When such a run
            is continued, it goes on with what it was told before.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        every: int = 200,
        images: int = 256,
        warmup: float = 0.1,
        stop: bool = False,
    ):
        if every < 0 or images < 2 or not 0 <= warmup <= 1:
            raise UserError(
                f"watchdog: every is {every}, images {images} and warmup {warmup}; every is at "
                "least 0 updates (0: never), images at least 2, warmup a fraction of training; set "
                "watchdog.every, watchdog.images and watchdog.warmup"
            )
        self.folder = None if folder is None else Path(folder)
        self.every, self.images, self.warmup, self.stop = every, images, warmup, stop
        self.history, self.chart = History(), Chart()
        self._cadence = Cadence(every, first=True)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a module it cannot read."""
        if self.every and not isinstance(pl_module, Pretraining):
            raise UserError(
                f"watchdog: {type(pl_module).__name__} is no Pretraining, whose objectives it "
                "knows; set watchdog.every: 0"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Know where training begins; forget what a lost part of the run was told."""
        self._cadence.start(trainer)
        if self.folder is not None and self.every and trainer.is_global_zero:
            _rewind(self.folder / "diagnoses.jsonl", trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Note what was logged; look, if it is time. Every rank takes part."""
        if not self._cadence.moved(trainer) or not self.every:
            return
        step = trainer.global_step
        interval: int = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if interval and step % interval == 0:
            self.history.note(step, _metrics(trainer, LOGGED))
        if self._cadence.now(trainer):
            assert isinstance(pl_module, Pretraining)
            self._look(trainer, pl_module, batch)

    def state_dict(self) -> dict[str, Any]:
        """The numbers and what stands."""
        return {"history": self.history.state_dict(), "chart": self.chart.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.history.load_state_dict(state_dict["history"])
        self.chart.load_state_dict(state_dict["chart"])

    # ---- a look -----------------------------------------------------------------------------

    def _look(self, trainer: pl.Trainer, module: Pretraining, batch: Batch) -> None:
        step = trainer.global_step
        measured = self._measure(trainer, module, batch)
        # An analysis is rarer than a look: what has not moved is its last number still.
        others = _metrics(trainer, FOREIGN).items()
        fresh = {key: value for key, value in others if value != self.history.last(key)}
        self.history.note(step, measured | fresh)
        known = facts(module, batch, world=trainer.world_size, images=self.images)
        settled = step >= self.warmup * module.total_steps
        told = self.chart.look(rules(known), self.history, step=step, settled=settled)
        shown = measured | {f"watchdog/{k}": v for k, v in self.chart.judged.items()}
        for logger in trainer.loggers:
            logger.log_metrics(shown, step=step)
        for diagnosis in told:
            self._tell(trainer, diagnosis)
        grave = [d for d in told if d.event == "begins" and d.kind == "collapse"]
        # The first rank decides: an analysis may have told its numbers to that one alone.
        if self.stop and trainer.strategy.broadcast(bool(grave)):
            self._stop(trainer, grave)

    def _measure(self, trainer: pl.Trainer, module: Pretraining, batch: Batch) -> dict[str, float]:
        """Numbers of the batch at hand, the mean over ranks."""
        images = largest_view(module, batch)[: self.images]
        with undisturbed(module.device):
            found = constant_losses(module, batch, self.images)
            if len(images) > 1:
                with frozen(module.backbone), trainer.precision_plugin.forward_context():
                    x = pooled(module, module.backbone(images))
                found |= spread(x)
        if not found:
            return {}
        numbers = torch.stack([value.to(module.device, torch.float32) for value in found.values()])
        # In numbers that are not finite FiniteLoss has its say, here they are left out.
        return {
            key: value
            for key, value in zip(found, distributed.mean(numbers).tolist(), strict=True)
            if math.isfinite(value)
        }

    # ---- what is told -----------------------------------------------------------------------

    def _tell(self, trainer: pl.Trainer, diagnosis: Diagnosis) -> None:
        """By the first rank: the log, W&B, the file."""
        if not trainer.is_global_zero:
            return
        grave = diagnosis.kind != "remark" and diagnosis.event == "begins"
        log.log(logging.WARNING if grave else logging.INFO, "watchdog: %s", diagnosis.text)
        for logger in trainer.loggers:
            if isinstance(logger, Tracker) and diagnosis.kind != "remark":
                logger.alert(diagnosis.title, diagnosis.text)
        if self.folder is not None:
            _append(self.folder / "diagnoses.jsonl", diagnosis)

    def _stop(self, trainer: pl.Trainer, grave: list[Diagnosis]) -> None:
        """End training, on every rank after the same update."""
        trainer.should_stop = True
        if trainer.is_global_zero:
            folders = [c.folder for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoints)]
            kept = f"{folders[0]}/last.ckpt" if folders else "the last checkpoint"
            names = ", ".join(d.name for d in grave)
            log.warning(
                "watchdog: training stops after update %d because of %s (watchdog.stop); %s is "
                "kept, and the same command goes on from it",
                trainer.global_step, names, kept,
            )  # fmt: skip


def _metrics(trainer: pl.Trainer, prefixes: tuple[str, ...]) -> dict[str, float]:
    metrics = trainer.callback_metrics.items()
    return {key: float(value) for key, value in metrics if key.startswith(prefixes)}


def _append(path: Path, diagnosis: Diagnosis) -> None:
    row = {name: value for name, value in vars(diagnosis).items() if value}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "time": round(time.time(), 3)}) + "\n")
    except OSError as error:  # a full disk: the log has it too
        log.warning("no line in %s: %s", path, error)


def _rewind(path: Path, step: int) -> None:
    """Drop lines of later updates: they belong to a part of the run that was lost."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _whole(line) and json.loads(line)["step"] <= step]
    if kept != lines:
        part = path.with_name(f"{path.name}.tmp.{os.getpid()}")
        part.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        part.replace(path)


def _whole(line: str) -> bool:
    """Not cut off when a run was killed."""
    return line.endswith("}")
