"""When checkpoints are written, which are kept, and under which names.

A checkpoint holds a state between two updates, never one inside an accumulation window: gradients
are not saved, so a run continued from inside a window would not be the run that was stopped.
"""

import logging
import math
import time
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.trainer.states import TrainerFn

from contramask import distributed
from contramask.checkpoints.files import AtomicCheckpointIO, CheckpointError, place, remove, sweep
from contramask.types import UserError

log = logging.getLogger(__name__)

REPORTED = "online/seconds"  # there once the online probes have logged, whatever they measure


class Checkpoints(Checkpoint):
    """Writes `step-00001000.ckpt` now and then, `last.ckpt` with each, `best.ckpt` by a metric.

    `last` and `best` are hard links where the file system has them, so they take no room. Also
    written: the state after the last update, and whatever `save` is called for.

    Args:
        folder: where; None: `checkpoints` in the trainer's `default_root_dir`.
        every: updates between periodic checkpoints.
        keep: how many periodic ones to keep, the newest; None: all.
        monitor: a key of the trainer's metrics; None: no `best.ckpt`. It is looked at after each
            validation and at each periodic checkpoint: let what measures it outside of validation
            do so at multiples of `every`.
        mode: whether the best is the greatest or the smallest.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        every: int = 1000,
        keep: int | None = 2,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
    ):
        if every < 1 or (keep is not None and keep < 0):
            raise UserError(
                f"checkpoints: every is {every} and keep is {keep}; every is at least 1 update, "
                "keep at least 0 or null for all; set both where the callback is configured"
            )
        self.folder = None if folder is None else Path(folder)
        self.every, self.keep, self.monitor, self.mode = every, keep, monitor, mode
        self.best: float | None = None
        self.best_step = -1
        self._saved = -1  # the step of the newest file written or read by this process
        self._seen = 0  # updates done at the last look
        self._between = True  # whether we are between two updates
        self._warned = False
        self._micro_batches = 0  # of an update, over ranks and accumulation
        self._before: int | None = None  # the same in the checkpoint we continue from

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Claim the folder, before Lightning loads a checkpoint."""
        if stage != "fit":
            return
        self.folder = self.folder or Path(trainer.default_root_dir) / "checkpoints"
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        self._micro_batches = trainer.world_size * trainer.accumulate_grad_batches
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep(self.folder)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make sure that this goes on where, and as, the run was stopped."""
        steps = distributed.gather(torch.tensor([trainer.global_step], device=pl_module.device))
        if steps.unique().numel() > 1:
            raise UserError(
                f"ranks would continue from different checkpoints, of steps {steps.tolist()}: "
                "do all nodes see the same run directory? set --root to a shared one"
            )
        if self._before not in (None, self._micro_batches):
            raise UserError(
                f"an update of this run is {self._before} micro-batches, ranks x "
                f"trainer.accumulate_grad_batches, but now {trainer.world_size} x "
                f"{trainer.accumulate_grad_batches}: the place in the data would be another; "
                "change one with the other"
            )
        self._check_validation(trainer)
        self._seen = trainer.global_step
        self._saved = trainer.global_step if trainer.ckpt_path else -1

    def _check_validation(self, trainer: pl.Trainer) -> None:
        interval, window = trainer.val_check_batch, trainer.accumulate_grad_batches
        if self.monitor and isinstance(interval, int) and interval % window:
            raise UserError(
                f"validation every {interval} batches falls between the {window} batches of an "
                "update, where the best cannot be saved; set trainer.val_check_interval to a "
                "multiple of trainer.accumulate_grad_batches"
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """From here on there are gradients that no checkpoint would hold."""
        self._between = False

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save if one is due and this micro-batch ended an update."""
        step = trainer.global_step
        self._between = step > self._seen
        self._seen = step
        if self._between and (self._due(step) or step == trainer.max_steps):
            self._judge(trainer)
            self.save(trainer)
            if REPORTED in trainer.callback_metrics:
                self._warn(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if what has just been measured is the best so far."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if self._between and self._judge(trainer):
            self.save(trainer, again=True)
        self._warn(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last state, if training ended before `max_steps` (a timer, say)."""
        if trainer.global_step > self._saved and self._between:
            self.save(trainer)
        if self.best is None:
            self._warn(trainer)

    def _warn(self, trainer: pl.Trainer) -> None:
        if self.monitor and self.monitor not in trainer.callback_metrics and not self._warned:
            known = ", ".join(sorted(trainer.callback_metrics)) or "none"
            log.warning("no metric %r for best.ckpt; there are: %s", self.monitor, known)
            self._warned = True

    def save(self, trainer: pl.Trainer, *, again: bool = False) -> Path:
        """Write the state of now, unless it is on disk (or `again`). A collective: call it on all
        ranks, between two updates.

        Returns:
            The file.

        Raises:
            CheckpointError: on every rank, when the first one cannot write.
        """
        assert self.folder is not None, "setup comes first"
        step = trainer.global_step
        # Another callback may call before this one's turn at the end of a batch.
        between = self._between or step > self._seen
        assert between, "a checkpoint inside an accumulation window cannot be continued"
        names = [f"step-{step:08d}.ckpt"] if self._due(step) else []
        names += ["best.ckpt"] if self.best_step == step else []
        names += ["last.ckpt"]
        first = self.folder / names[0]
        if step > self._saved or again:
            start = time.perf_counter()
            self._write(trainer, first, [self.folder / name for name in names[1:]])
            self._saved = step
            log.info("saved %s in %.2f s", ", ".join(names), time.perf_counter() - start)
        return first

    def _write(self, trainer: pl.Trainer, first: Path, others: list[Path]) -> None:
        problem = ""
        try:
            # Lightning's word for "with optimiser and callbacks"; it is not how files are loaded.
            trainer.save_checkpoint(first, weights_only=False)
        except CheckpointError as error:
            problem = str(error)
            # Only the first rank writes, so only it can fail; the others are in the barrier at the
            # end of `save_checkpoint`, which it has left.
            trainer.strategy.barrier("Trainer.save_checkpoint")
        if trainer.is_global_zero and not problem:
            try:
                for name in others:
                    place(first, name)
                self._prune(trainer.global_step)
            except CheckpointError as error:
                problem = str(error)
        problem = trainer.strategy.broadcast(problem)
        if problem:
            raise CheckpointError(problem)

    def _prune(self, step: int) -> None:
        """Drop periodic checkpoints older than the newest few, also those of earlier starts.

        Files of later steps than now are not counted as newer: they were passed over as damaged
        when the run was continued, and are replaced when their step comes.
        """
        assert self.folder is not None
        if self.keep is None:
            return
        files = sorted(self.folder.glob("step-*.ckpt"))
        past = [file for file in files if int(file.stem.removeprefix("step-")) <= step]
        for file in past[: max(len(past) - self.keep, 0)]:
            remove(file)

    def _due(self, step: int) -> bool:
        return step % self.every == 0

    def _judge(self, trainer: pl.Trainer) -> bool:
        """Whether the metric is better than ever, by the first rank's value of it.

        Only a strict improvement counts, so a value that is still there from an earlier step is
        not taken for one of now; NaN never counts.
        """
        if self.monitor is None:
            return False
        # Asked of all ranks: some values, such as those of analyses, are known to the first alone.
        value = trainer.callback_metrics.get(self.monitor, math.nan)
        now = float(trainer.strategy.broadcast(float(value)))
        sign = 1 if self.mode == "max" else -1
        if math.isnan(now) or (self.best is not None and sign * now <= sign * self.best):
            return False
        self.best, self.best_step = now, trainer.global_step
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a continued run has to beat, and to be like."""
        return {
            "monitor": self.monitor,
            "mode": self.mode,
            "best": self.best,
            "best_step": self.best_step,
            "micro_batches": self._micro_batches,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best, unless another metric is watched now."""
        self._before = state_dict["micro_batches"]
        if (state_dict["monitor"], state_dict["mode"]) == (self.monitor, self.mode):
            self.best, self.best_step = state_dict["best"], state_dict["best_step"]
