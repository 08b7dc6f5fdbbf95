"""A job that is told to stop saves between two updates, asks to be run again, and leaves.

Signal handlers only take note (`contramask.callbacks.signals`). After every update all ranks
exchange their notes, so they stop after the same one: on the host alone, at once; on GPUs one
update later, so that nobody waits (`contramask.callbacks.agreement`).
"""

import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Never

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.environments import (
    SLURMEnvironment,  # pyright: ignore[reportPrivateImportUsage]
)
from pytorch_lightning.trainer.states import TrainerFn

from contramask import distributed
from contramask.callbacks.agreement import Agreement, Table
from contramask.callbacks.checkpoint import Checkpoints
from contramask.callbacks.signals import inbox
from contramask.types import UserError

log = logging.getLogger(__name__)

PAUSE = 2.0  # seconds
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: the job will be run again


class Preempted(SystemExit):
    """Raised on every rank after the same update, once the checkpoint is on disk.

    The first rank's code is 75 if SLURM will run the job again, else 128 + the signal's number, as
    a shell has it. The others' is 0: `srun --kill-on-bad-exit` and Lightning's launcher would
    answer any other by killing the first one, which may still be talking to its tracker.
    """


class Preemption(Checkpoint):
    """Stops training on SIGUSR1, SIGTERM or Ctrl-C without losing an update.

    Under SLURM a job that exits by itself is over, whatever its code, so it asks `scontrol` to be
    run again; but only while SLURM says it is RUNNING: a cancelled one would rise from the dead.
    A second Ctrl-C leaves at once.

    It is a kind of `Checkpoint` so that Lightning runs it after all other callbacks: what they
    learned from the last batch belongs in the checkpoint.

    Args:
        again: what is said to continue by; None: the run's name and `--resume auto`.
    """

    def __init__(self, *, again: str | None = None):
        self.again = again
        self.before_exit: list[Callable[[], object]] = []  # the first rank calls them, after saving
        self._agreement: Agreement | None = None
        self._checkpoints: Checkpoints | None = None
        self._seen = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the signals over, before anything slow happens."""
        if stage != TrainerFn.FITTING:
            return
        found = [c for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoints)]
        if not found:
            raise UserError(
                "the callback Preemption saves by the callback Checkpoints, which is missing; add "
                "contramask.callbacks.checkpoint.Checkpoints to trainer.callbacks"
            )
        self._checkpoints = found[0]
        inbox.watch()
        keep_lightning_off_signals(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave at once if a signal came during set-up: there is nothing new to save."""
        inbox.watch(signal.SIGINT)
        self._seen = trainer.global_step
        several = distributed.world() > 1
        self._agreement = Agreement(delayed=several and pl_module.device.type == "cuda")
        number = self._exchange(pl_module.device) or self._read(self._agreement.flush())
        if number:
            self._leave(trainer, number, None)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """After an update: if any rank was told to stop, save and leave."""
        if trainer.global_step == self._seen:
            return  # inside an accumulation window
        self._seen = trainer.global_step
        number = self._exchange(pl_module.device)
        if number:
            assert self._checkpoints is not None
            inbox.deafen()
            self._leave(trainer, number, self._checkpoints.save(trainer))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back: the run is complete."""
        inbox.restore()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back, unless we are leaving because of one."""
        if not isinstance(exception, Preempted):
            inbox.restore()

    def _exchange(self, device: torch.device) -> int:
        """The greatest signal over ranks, as far as it is known; 0: none. A collective."""
        assert self._agreement is not None
        if distributed.world() == 1:
            return inbox.received
        # A fill, not a copy: copying from the host could make it wait for the device.
        row = torch.full((1,), inbox.received, device=device)
        return self._read(self._agreement.put(row, step=self._seen, names=("signal",)))

    @staticmethod
    def _read(table: Table | None) -> int:
        return 0 if table is None else int(table.rows.max())

    def _leave(self, trainer: pl.Trainer, number: int, saved: Path | None) -> Never:
        inbox.deafen()
        code = 0
        if trainer.is_global_zero:
            name, step = signal.Signals(number).name, trainer.global_step
            where = f"saved {saved}" if saved else "nothing new to save"
            log.warning("%s after update %d; %s", name, step, where)
            for function in self.before_exit:
                function()
            if number != signal.SIGINT and requeue():
                code = TRY_AGAIN
            else:
                assert self._checkpoints is not None
                assert self._checkpoints.folder is not None
                run = self._checkpoints.folder.parent.name
                how = self.again or f"the same command with --name {run} --resume auto"
                log.warning("continue by %s", how)
                code = 128 + number
        # The others wait here: the first that exits may take the rest of the job with it.
        trainer.strategy.barrier("preempted")
        raise Preempted(code)


def requeue() -> bool:
    """Ask SLURM to run this job again; False if there is none, or SLURM will not.

    On a preemption SLURM says RUNNING, on scancel and at the time limit COMPLETING or the like.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    answer = _scontrol("show", "job", job, "-o").stdout
    state = next((w for w in answer.split() if w.startswith("JobState=")), "its state is unknown")
    if state != "JobState=RUNNING":
        log.warning("job %s is not asked to run again: %s", job, state)
        return False
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    done = _scontrol("requeue", job)
    log.warning(
        "job %s %s", job, f"stays as it is: {done.stderr}" if done.returncode else "will run again"
    )
    return done.returncode == 0


def _scontrol(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Ask SLURM's controller, three times if need be: a busy one lets questions time out."""
    command = ["scontrol", *arguments]
    done = subprocess.CompletedProcess(command, 127, "", "")
    for attempt in range(3):
        time.sleep(PAUSE if attempt else 0.0)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except (FileNotFoundError, subprocess.TimeoutExpired) as error:
            done.stderr = str(error)
        if done.returncode == 0:
            break
        log.warning("%s: %s", " ".join(command), done.stderr.strip())
    return done


def environment_plugins() -> list[SLURMEnvironment]:
    """For `Trainer(plugins=...)`: under SLURM, its environment without Lightning's auto-requeue.

    That one saves and runs collectives inside the signal handler, which hangs or tears the
    checkpoint when the signal comes at a bad moment.
    """
    by_srun = "SLURM_NTASKS" in os.environ
    in_shell = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return [SLURMEnvironment(auto_requeue=False)] if by_srun and not in_shell else []


def keep_lightning_off_signals(trainer: pl.Trainer) -> None:
    """Make this trainer leave signals to us.

    Lightning 2.6 sets a SIGTERM handler between set-up and training (`register_signal_handlers`)
    which runs a collective inside the handler: ranks that are inside another one hang. And before
    each batch of a run of several ranks it broadcasts whether SIGTERM came and reads the answer
    (`_broadcast_sigterm_tensor`), which makes every GPU idle once per batch; with our handlers the
    answer is always no. There is no public switch, so both are replaced on this one trainer. A
    version that has them no more needs no such treatment; the tests tell.
    """
    connector, loop = trainer._signal_connector, trainer.fit_loop.epoch_loop
    for owner, method in (
        (connector, "register_signal_handlers"),
        (loop, "_broadcast_sigterm_tensor"),
    ):
        if method in vars(type(owner)):
            setattr(owner, method, _nothing)


def _nothing() -> None:
    """Stands in for what Lightning would do about signals."""
