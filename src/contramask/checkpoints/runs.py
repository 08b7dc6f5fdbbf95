"""Run directories: one for each run, found again by name, never shared by two configurations.

`runs/NAME/` holds `config.yaml` (resolved), `checkpoints/` and what the run writes about itself.
"""

import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from contramask.checkpoints.differences import FREE, MOVABLE, differences
from contramask.checkpoints.files import newest
from contramask.types import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run directory, ready to be used; `checkpoint` is what to continue from, if anything."""

    path: Path
    checkpoint: Path | None = None

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints are."""
        return self.path / "checkpoints"


def run_name(name: str | None, config: Path | None = None) -> str:
    """The user's name, else one of the SLURM job, else one of the time; with the config's stem.

    A requeued job keeps its id, so it finds its run. Ranks that another process has launched
    learn the time from it, through the environment.

    Raises:
        UserError: a name that is no plain directory name, or ranks that cannot know the time.
    """
    stem = config.stem if config else "run"
    if name is not None:
        if not re.fullmatch(r"[\w][\w.+=-]*", name):
            raise UserError(
                f"run name {name!r}: letters, digits and . _ + = - are allowed, because it names a "
                "directory; set --name, and the directory above it by --root"
            )
        return name
    job = os.environ.get("SLURM_JOB_ID")
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    # A shell inside an allocation may start many runs in one job.
    if job and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return f"{stem}-{job}"
    if is_first():
        os.environ["CONTRAMASK_RUN"] = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    elif "CONTRAMASK_RUN" not in os.environ:
        raise UserError("a run of several processes that were launched from outside needs --name")
    return os.environ["CONTRAMASK_RUN"]


def latest(root: Path, stem: str, config: Mapping[str, Any], *, free: Sequence[str] = FREE) -> str:
    """The name of the newest run with a checkpoint and this configuration.

    Of those that were named by their time or job: `STEM-DATE-TIME`, `STEM-JOB`.

    Raises:
        UserError: there is none.
    """
    pattern = re.compile(re.escape(stem) + r"-\d+([-_]\d+)?")
    runs = [path for path in root.glob(f"{stem}-*") if pattern.fullmatch(path.name)]
    saved = {path: (path / "checkpoints").stat().st_mtime for path in runs if has_checkpoint(path)}
    for path in sorted(saved, key=saved.__getitem__, reverse=True):
        before = yaml.safe_load((path / "config.yaml").read_text("utf-8"))
        if not differences(before, config, free=free, movable=MOVABLE):
            return path.name
    raise UserError(
        f"--resume, but no run of {stem} in {root} has a checkpoint and this configuration "
        f"({len(runs)} looked at); give --name, or leave --resume out to start anew"
    )


def has_checkpoint(path: Path) -> bool:
    """Whether a run directory holds any checkpoint, good or not."""
    return any(path.glob("checkpoints/*.ckpt"))


def open_run(
    root: Path,
    name: str,
    config: Mapping[str, Any],
    *,
    resume: bool | Literal["auto"] = "auto",
    free: Sequence[str] = FREE,
    movable: Sequence[str] = MOVABLE,
) -> Run:
    """Make a run directory, or find one to continue. Only the first process writes or refuses.

    Args:
        root: the directory of all runs.
        name: see `run_name`.
        config: the resolved configuration, of plain values.
        resume: `auto` continues what is there and starts what is not; True insists on a checkpoint;
            False insists on an unused directory.
        free: patterns of dotted keys that may differ from the run's configuration.
        movable: likewise, of file names of which the directory may differ.

    Raises:
        UserError: the directory belongs to another configuration, is in use, or holds nothing good.
    """
    path = root / name
    if resume is True:
        _need_checkpoint(path)  # on every rank: one that went on would wait for the first
    if is_first():
        if resume is False and path.is_dir() and any(path.iterdir()):
            raise UserError(
                f"run directory {path} is in use ({_contents(path)}): continue it with --resume "
                "auto, or start another run with another --name"
            )
        _claim(path, config, free=free, movable=movable)
    if resume is False:
        return Run(path)
    return Run(path, _last_good(path / "checkpoints"))


def _need_checkpoint(path: Path) -> None:
    if not has_checkpoint(path):
        raise UserError(
            f"--resume, but there is no checkpoint in {path / 'checkpoints'}: check --root and "
            "--name, or use --resume auto to start where there is none"
        )


def _last_good(checkpoints: Path) -> Path | None:
    found = newest(checkpoints)
    if found is None and any(checkpoints.glob("*.ckpt")):
        raise UserError(
            f"none of the checkpoints in {checkpoints} is whole (the log names the damage): put a "
            "good one there, or delete the directory to start again"
        )
    return found


def is_first() -> bool:
    """Whether this process is rank 0, by the launcher's variables: before there is a group."""
    places = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")
    return all(os.environ.get(place, "0") == "0" for place in places)


def _claim(
    path: Path, config: Mapping[str, Any], *, free: Sequence[str], movable: Sequence[str]
) -> None:
    """Write the configuration, or hold it against the one that is there."""
    file = path / "config.yaml"
    before = yaml.safe_load(file.read_text("utf-8")) if file.is_file() else None
    lines = differences(before or {}, config, free=free, movable=movable)
    # Of a start that failed, on a mistake in the configuration say, nothing is worth keeping.
    if before is None or (lines and not has_checkpoint(path)):
        path.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.tmp.{os.getpid()}")
        part.write_text(yaml.safe_dump(dict(config), sort_keys=False), "utf-8")
        os.replace(part, file)
        if before is not None:
            log.info("%s had no checkpoint yet: it takes this configuration", path)
    elif lines:
        raise UserError(
            f"run directory {path} belongs to another configuration: {'; '.join(lines)}; put these "
            "back to continue the run, or start another with another --name"
        )


def _contents(path: Path) -> str:
    steps = [
        int(m[1]) for p in path.glob("checkpoints/*") if (m := re.search(r"-0*(\d+)\.", p.name))
    ]
    return f"its last checkpoint is of step {max(steps)}" if steps else "it has no checkpoint yet"
