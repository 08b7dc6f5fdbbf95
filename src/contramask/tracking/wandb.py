"""Weights & Biases, as a guest: it may be away at the start, leave in the middle, or never end.

The only importer of wandb, and only when a run needs it. Nothing here can stop a training: what
goes wrong is told once, and the numbers are in `metrics.jsonl` all the same.
"""

import contextlib
import logging
import os
import secrets
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.loggers.logger import (
    DummyLogger,
    rank_zero_experiment,  # pyright: ignore[reportPrivateImportUsage]
)
from pytorch_lightning.utilities import rank_zero_only

from contramask.tracking.credentials import credentials, server
from contramask.types import UserError

log = logging.getLogger(__name__)

Mode = Literal["auto", "online", "offline", "disabled"]

INIT_TIMEOUT = 20.0  # seconds to wait for the server at the start; wandb's own are 90
FINISH_TIMEOUT = 30.0  # seconds to wait for uploads at the end; wandb's own are without bound
STEP = "trainer/global_step"  # the x axis of every curve, also in Lightning's own logger


def make_wandb(
    run_dir: str | Path,
    *,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    project: str = "contramask",
    mode: Mode = "auto",
    entity: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
) -> Logger:
    """A logger for one run directory; a resume in the same directory continues the same run.

    Args:
        run_dir: where the run's id and the local files of W&B are kept.
        name: shown in W&B; None: the name of the directory.
        config: the resolved configuration.
        mode: `auto` is $WANDB_MODE if set, else online with an API key and offline without.
        project: of W&B.
        entity: of W&B, a user or a team; None: the key's own.
        group: of W&B, e.g. runs that differ by their seed.
        tags: of W&B.

    Raises:
        UserError: for an unknown mode.
    """
    chosen = _choose(mode)
    if chosen == "disabled":
        return DummyLogger()
    run_dir = Path(run_dir)
    init = {
        "name": name or run_dir.name,
        "config": dict(config or {}),
        "entity": entity,
        "group": group,
        "tags": list(tags),
    }
    return Tracker(run_dir, project=project, online=chosen == "online", init=init)


class Tracker(WandbLogger):
    """A W&B run that starts with the first number, on rank 0."""

    def __init__(self, run_dir: Path, *, project: str, online: bool, init: dict[str, Any]):
        super().__init__(save_dir=run_dir, project=project)
        self.run_dir, self.online, self._init = run_dir, online, init
        self._broken = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run, started if it is not."""
        if self._experiment is None:
            self._experiment = self._start()
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Send numbers. Lightning's epoch is left out: the training stream has no end."""
        row = {k: v for k, v in metrics.items() if k != "epoch"}
        self._try(lambda run: run.log(row if step is None else {**row, STEP: step}))

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kw: Any) -> None:
        """Nothing: the resolved configuration was sent at the start."""

    @rank_zero_only
    def log_pictures(self, pictures: Mapping[str, Path], step: int) -> None:
        """Send image files as they are, by key."""
        import wandb

        images = {key: wandb.Image(str(path)) for key, path in pictures.items()}
        self._try(lambda run: run.log({**images, STEP: step}))

    @rank_zero_only
    def alert(self, title: str, text: str) -> None:
        """Tell whoever has asked W&B for alerts, by mail or chat. Offline: once it is synced."""
        title = title[:63]  # the server takes no more
        self._try(lambda run: run.alert(title, text, level="WARN", wait_duration=0))

    @rank_zero_only
    def mark_preempting(self) -> None:
        """Tell the server that the scheduler ends this run, and not a fault."""
        if self._experiment is not None:
            self._try(lambda run: run.mark_preempting())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Finish. Numbers that come later continue the same run."""
        if self._experiment is not None:
            self._try(lambda run: run.finish(exit_code=0 if status == "success" else 1))
            self._experiment = None

    def sync_command(self) -> str:
        """What sends every part of the run that was recorded here alone, in order."""
        return f"wandb sync --include-online {self.run_dir / 'wandb'}/*run-*"

    def _start(self) -> Any:
        import wandb

        if self.online:
            try:
                run = self._open("online")
            except (wandb.Error, TimeoutError, OSError) as error:
                # The service keeps the id of the run that failed until it is torn down.
                wandb.teardown()
                self.online = False
                run = self._open("offline")
                why = str(error).split("\n")[0]
                refused = "W&B: no run at %s (%s); recording offline; to send it later: %s"
                log.warning(refused, server(), why, self.sync_command())
        else:
            run = self._open("offline")
            log.info("W&B: recording offline; to send it later: %s", self.sync_command())
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        return run

    def _open(self, mode: Literal["online", "offline"]) -> Any:
        import wandb

        settings = wandb.Settings(
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
            finish_timeout_raises=True,
            quiet=True,
            silent=mode == "offline",
        )
        return wandb.init(
            id=_identity(self.run_dir),
            dir=self.run_dir,
            project=self._project,
            mode=mode,
            resume="allow",
            reinit="finish_previous",
            settings=settings,
            **self._init,
        )

    def _try(self, act: Callable[[Any], object]) -> None:
        """Do something with the run; after the first failure, nothing more."""
        if self._broken:
            return
        try:
            act(self.experiment)
        except TimeoutError:
            late = "W&B: the server did not take the rest in %g s; to send it: %s"
            log.warning(late, FINISH_TIMEOUT, self.sync_command())
        except _failures() as error:
            self._broken, self._experiment = True, None
            reason = str(error) or type(error).__name__
            log.error("W&B: given up (%s); metrics.jsonl goes on; %s", reason, self.sync_command())
            _forget_service()


def _choose(mode: str) -> str:
    given = os.environ.get("WANDB_MODE", "auto") if mode == "auto" else mode
    given = {"dryrun": "offline", "run": "online", "": "auto"}.get(given, given)
    if given not in get_args(Mode):
        raise UserError(
            f"W&B mode is {given!r}; allowed are {', '.join(get_args(Mode))}; "
            "set it where the logger is given, or $WANDB_MODE"
        )
    if given == "auto":
        return "online" if credentials() else "offline"
    return given


def _identity(run_dir: Path) -> str:
    """The id of this run in W&B, made at the first start and kept in the run directory."""
    path = run_dir / "wandb-id.txt"
    if path.exists() and (known := path.read_text().strip()):
        return known
    run_dir.mkdir(parents=True, exist_ok=True)
    new = secrets.token_hex(4)  # not from a generator that training may use
    path.write_text(f"{new}\n")
    return new


def _forget_service() -> None:
    """Let go of a service process that is gone, which would be waited for at exit."""
    import wandb

    with contextlib.suppress(OSError):
        wandb.teardown()


def _failures() -> tuple[type[BaseException], ...]:
    """How a run can fail when its service process is gone."""
    import wandb
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

    return (wandb.Error, OSError, HandleAbandonedError, MailboxClosedError)
