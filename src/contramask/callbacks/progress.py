"""Where training is, for people: three lines that stay in place, or one now and then in a log."""

import logging
import sys
import time
from collections import deque
from typing import Any, TextIO

import pytorch_lightning as pl
import rich
from pytorch_lightning.callbacks import ProgressBar
from rich.console import Console
from rich.live import Live

from contramask.callbacks.standing import Standing, joined
from contramask.types import Batch

Handler = logging.StreamHandler[TextIO]


class Progress(ProgressBar):
    """Steps, images a second, time left, the terms of the loss, and what probes found last.

    Metrics are read at logged steps, where the loggers wait for the device anyway.

    Args:
        interval: seconds between two lines where the output is no terminal.
        console: where to; None: rich's own, which is standard output.
    """

    def __init__(self, *, interval: float = 30.0, console: Console | None = None):
        super().__init__()
        self.interval = interval
        self.standing = Standing()
        self._console = console or rich.get_console()
        self._enabled = True
        self._live: Live | None = None
        self._past: deque[tuple[float, int]] = deque(maxlen=120)  # (time, step), a second apart
        self._began, self._told = 0.0, None
        self._diverted: list[tuple[Handler, TextIO]] = []

    def disable(self) -> None:
        """Say nothing, as on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Speak again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        self._console.print(*args, **kwargs)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin where training begins: at 0, or where a checkpoint left off."""
        if not self._enabled:
            return
        total = trainer.max_steps if trainer.max_steps > 0 else None
        self.standing = Standing(step=trainer.global_step, total=total, note="first step ...")
        self._past.clear()
        self._began, self._told = time.monotonic(), None
        if self._console.is_terminal:
            self._live = Live(self.standing, console=self._console, refresh_per_second=4)
            plain = (sys.stderr, sys.stdout)
            self._live.start(refresh=True)
            self._diverted = _divert(plain)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Move on, when a weight update is done."""
        standing, now = self.standing, time.monotonic()
        if not self._enabled or trainer.global_step == standing.step:
            return
        standing.step, standing.note, standing.took = trainer.global_step, "", now - self._began
        if not self._past or now - self._past[-1][0] >= 1:
            self._past.append((now, standing.step))
        updates = trainer.world_size * trainer.accumulate_grad_batches
        self._estimate(now, images=len(batch["label"]) * updates)
        every: int = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        ends = standing.step == standing.total
        due = self._live is None and (self._told is None or now - self._told >= self.interval)
        if due or ends or standing.loss is None or (every and standing.step % every == 0):
            standing.read(trainer.callback_metrics)
        if self._live is None and (due or ends):
            self._told = now
            self._say(standing.line())

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say why the steps stand still."""
        self.standing.note = "validating ..."

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on, with what validation found."""
        self.standing.note = ""
        if self._enabled and not trainer.sanity_checking:
            self.standing.read(trainer.callback_metrics)
            self.standing.results_step = self.standing.step
            if trainer.state.fn != "fit":
                self._say(joined(self.standing.found()))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the last state on the screen."""
        if self._live is not None:
            self.standing.read(trainer.callback_metrics)
        self._stop()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Give the terminal back."""
        self._stop()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the terminal back."""
        self._stop()

    def _estimate(self, now: float, *, images: int) -> None:
        """The time left, from the last minutes as they were, pauses included; `images` a step."""
        # The first update of this process is not among them: it starts workers and compiles.
        standing, (then, before) = self.standing, self._past[0]
        if standing.step == before:
            return
        pace = (now - then) / (standing.step - before)
        if standing.total is not None:
            standing.left = pace * (standing.total - standing.step)
        if not standing.measured:
            standing.images_per_s = images / max(pace, 1e-9)

    def _say(self, line: str) -> None:
        stamp = time.strftime("%H:%M:%S")
        self._console.print(f"{stamp}  {line}", markup=False, highlight=False, soft_wrap=True)

    def _stop(self) -> None:
        if self._live is not None:
            for handler, stream in self._diverted:
                handler.setStream(stream)
            self._live.stop()
            self._live = None


def _divert(plain: tuple[TextIO, ...]) -> list[tuple[Handler, TextIO]]:
    """Send log lines above the bar; handlers made before it hold the plain streams.

    Returns:
        The handlers and what they wrote to.
    """
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    found = [h for one in loggers if isinstance(one, logging.Logger) for h in one.handlers]
    mine = [h for h in found if isinstance(h, logging.StreamHandler) and h.stream in plain]
    before = [(handler, handler.stream) for handler in mine]
    for handler in mine:
        handler.setStream(sys.stderr)
    return before
