"""How fast training is and what it waits for, over the steps between two logged ones.

The clock of a window is wall time without what other callbacks and validation took, so that a probe
or a checkpoint is no slow training; logging, and all that Lightning does between two steps, counts.
The device is synchronised once a window, where the loggers do it anyway, never at every step: work
queued on a GPU when a callback synchronises in the middle of a window is charged to that callback.
"""

import logging
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from contramask import distributed
from contramask.callbacks.clock import Clock
from contramask.tracking.jsonl import JSONLLogger
from contramask.training.flops import Planned, StepFlops, peak_flops
from contramask.types import Batch

log = logging.getLogger(__name__)

_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32}


class Throughput(pl.Callback):
    """Logs `speed/...`, `memory/...` and `data/...` at every logged step.

    - `speed/images_per_s`: of all ranks; `speed/step_s`: seconds of a weight update.
    - `speed/data_wait`: share of the time in which the trainer stood still for its loader, mean
      over ranks. A GPU may have had work queued meanwhile.
    - `speed/tflops`: of one device, in 10^12 operations a second; `speed/mfu`: model-FLOPs
      utilisation, that over what the device promises for this precision, if known.
    - `memory/allocated_gib`, `memory/reserved_gib`: of the GPU, the most so far;
      `memory/rss_gib`: of this process now.
    - `data/images`: seen so far by all ranks; `data/epoch`: that in data sets, if their size is
      known; `data/skipped`: bad samples of all ranks, if the data module counts them.
    """

    def __init__(self) -> None:
        self._clock: Clock | None = None
        self._flops: StepFlops | None = None
        self._operations: int | None = None  # of a micro-batch
        self._began: float | None = None  # when the window did
        self._step = self._window = self._images = 0
        self._skipped_before = self._skipped = 0

    # ---- the window -------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start listening. The first update is not timed: it compiles, and starts the workers."""
        self._clock = Clock.listen(trainer, own=self.state_key)
        self._began, self._step = None, trainer.global_step
        self._flops = StepFlops(pl_module) if isinstance(pl_module, Planned) else None
        for logger in trainer.loggers:
            if isinstance(logger, JSONLLogger):
                logger.rewind(trainer.global_step)  # drop what a lost part of the run had logged

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Count the operations of the first micro-batch while it is computed."""
        if self._flops is not None and self._operations is None:
            self._flops.__enter__()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Report at a logged step, once its last micro-batch is done."""
        if self._flops is not None and self._operations is None:
            self._flops.__exit__(None, None, None)
            self._operations = self._flops.total(batch)
        self._images += len(batch["label"])
        step = trainer.global_step
        if step == self._step:  # gradients are being accumulated
            return
        self._step = step
        every: int = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if self._began is None or (every and step % every == 0):
            now = _now(pl_module.device)
            if self._began is not None:
                self._report(trainer, pl_module, batch, now - self._began)
            self._restart(now)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation is no training time."""
        if self._clock is not None:
            self._clock.validation(True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training goes on."""
        if self._clock is not None:
            self._clock.validation(False)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Stop listening: Lightning tears no callback down after an error."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop listening."""
        if self._clock is not None:
            self._clock.leave(trainer)
            self._clock = None
        if self._flops is not None:
            self._flops.__exit__(None, None, None)

    def state_dict(self) -> dict[str, Any]:
        """Bad samples so far."""
        return {"skipped": self._skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from those of before."""
        self._skipped = self._skipped_before = state_dict["skipped"]

    # ---- the report -------------------------------------------------------------------------

    def _restart(self, now: float) -> None:
        assert self._clock is not None
        self._clock.restart()
        self._began, self._window, self._images = now, self._step, 0

    def _report(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, wall: float
    ) -> None:
        assert self._clock is not None
        device = pl_module.device
        seconds = max(wall - self._clock.aside, 1e-9)
        faults: Counter[str] | None = _data(trainer, "faults")  # of this rank, by reason
        bad = float(sum((faults or {}).values()))
        mine = torch.tensor([seconds, self._clock.waited / seconds, bad], device=device)
        seconds, wait, bad = distributed.mean(mine).tolist()
        images = len(batch["label"])
        seen = batch["position"] + images * (trainer.world_size - trainer.global_rank)
        values = {
            "speed/images_per_s": self._images * trainer.world_size / seconds,
            "speed/step_s": seconds / (self._step - self._window),
            "speed/data_wait": wait,
            "data/images": float(seen),
            **self._utilisation(trainer, device, self._images / images / seconds),
            **_memory(device),
        }
        if size := _data(trainer, "num_train"):
            values["data/epoch"] = seen / size
        if faults is not None:
            self._skipped = self._skipped_before + round(bad * trainer.world_size)
            values["data/skipped"] = float(self._skipped)
        pl_module.log_dict(values, logger=False, on_epoch=False, batch_size=images)
        # To the loggers by hand: the trainer tells them after a checkpoint has been written, and a
        # run that is stopped there would lack this row.
        for logger in trainer.loggers:
            logger.log_metrics(values, step=self._step)

    def _utilisation(
        self, trainer: pl.Trainer, device: torch.device, rate: float
    ) -> dict[str, float]:
        """What is known of it; `rate`: micro-batches a second on one device."""
        if not self._operations:
            return {}
        found = {"speed/tflops": self._operations * rate / 1e12}
        dtype = _DTYPES.get(str(trainer.precision).split("-")[0])
        peak = None if dtype is None else peak_flops(device, dtype)
        if peak is not None:
            found["speed/mfu"] = self._operations * rate / peak
        return found


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _data(trainer: Any, name: str) -> Any:
    """What the data module knows, if there is one and it does."""
    return getattr(getattr(trainer, "datamodule", None), name, None)


def _memory(device: torch.device) -> dict[str, float]:
    found = {}
    if device.type == "cuda":
        found["memory/allocated_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        found["memory/reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    pages = Path("/proc/self/statm")
    if pages.exists():  # Linux
        resident = int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        found["memory/rss_gib"] = resident / 2**30
    return found
