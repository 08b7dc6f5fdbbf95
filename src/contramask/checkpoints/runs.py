"""Run directories: one for each run, found again by name, never shared by two configurations.

`runs/NAME/` holds `config.yaml` (resolved), `checkpoints/` and what the run writes about itself.
"""

import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml

from contramask.checkpoints.files import newest
from contramask.types import UserError

log = logging.getLogger(__name__)

# What may differ between the parts of one run: where and how fast it runs, what is watched; never
# what is learned. Patterns of dotted keys.
FREE = (
    "config*",
    "name",
    "root",
    "resume",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accumulate_grad_batches",  # the images of an update are checked when training starts
    "trainer.strategy*",
    "trainer.plugins*",
    "trainer.callbacks*",  # observers; they leave training bitwise as it is
    "trainer.logger*",
    "trainer.profiler*",
    "trainer.log_every_n_steps",
    "trainer.enable_*",
    "trainer.limit_val_batches",
    "trainer.val_check_interval",
    "trainer.check_val_every_n_epoch",
    "trainer.num_sanity_val_steps",
    "trainer.default_root_dir",
    "tracking*",
    "data.workers",
    "data.streaming.prefetch",
    "data.streaming.context",
)
# Files that may lie in another directory (staged to a local disk, say) under the same name.
MOVABLE = ("data.train", "data.val", "data.streaming.index")
WHY = {
    "trainer.max_steps": "schedules are functions of step / max_steps: another length is another "
    "run from its first step on"
}


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
    if is_first():
        if resume is False and path.is_dir() and any(path.iterdir()):
            raise UserError(
                f"run directory {path} is in use ({_contents(path)}): continue it with --resume "
                "auto, or start another run with another --name"
            )
        _claim(path, config, free=free, movable=movable)
    if resume is False:
        return Run(path)
    found = _last_good(path / "checkpoints")
    if found is None and resume is True:
        raise UserError(
            f"--resume true, but there is no checkpoint in {path / 'checkpoints'}: check --root "
            "and --name, or use --resume auto to start where there is none"
        )
    return Run(path, found)


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
    path.mkdir(parents=True, exist_ok=True)
    file = path / "config.yaml"
    if not file.is_file():
        part = file.with_name(f"{file.name}.tmp.{os.getpid()}")
        part.write_text(yaml.safe_dump(dict(config), sort_keys=False), "utf-8")
        os.replace(part, file)
        return
    before = yaml.safe_load(file.read_text("utf-8"))
    lines = differences(before, config, free=free, movable=movable)
    if lines:
        raise UserError(
            f"run directory {path} belongs to another configuration:\n  "
            + "\n  ".join(lines)
            + "\nput these back to continue the run, or start another with another --name"
        )


def differences(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    free: Sequence[str] = (),
    movable: Sequence[str] = (),
) -> list[str]:
    """Lines `key: before -> after (why)` for the keys that must not differ, and do."""
    old, new = _flat(before, movable), _flat(after, movable)
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if _any_of(free, key):
            continue
        a, b = old.get(key, "not set"), new.get(key, "not set")
        if a != b:
            lines.append(f"{key}: {a} -> {b}" + (f" ({WHY[key]})" if key in WHY else ""))
    return lines


def _flat(config: object, movable: Sequence[str], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key; a list is a leaf unless it holds mappings."""
    if _any_of(movable, prefix):
        return {prefix: _file_names(config)}
    if isinstance(config, Mapping) and config:
        pairs = [(str(key), value) for key, value in config.items()]
    elif isinstance(config, list | tuple) and any(isinstance(x, Mapping) for x in config):
        pairs = [(str(i), value) for i, value in enumerate(config)]
    else:
        return {prefix: list(config) if isinstance(config, tuple) else config}
    flat = {}
    for key, value in pairs:
        flat |= _flat(value, movable, f"{prefix}.{key}" if prefix else key)
    return flat


def _any_of(patterns: Sequence[str], key: str) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _file_names(value: object) -> object:
    """Paths without their directories, also in lists, `::` lists, and as keys."""
    if isinstance(value, str):
        return "::".join(part.rsplit("/", 1)[-1] for part in value.split("::"))
    if isinstance(value, Mapping):
        return {_file_names(key): weight for key, weight in value.items()}
    return [_file_names(item) for item in value] if isinstance(value, list) else value


def _contents(path: Path) -> str:
    steps = [
        int(m[1]) for p in path.glob("checkpoints/*") if (m := re.search(r"-0*(\d+)\.", p.name))
    ]
    return f"its last checkpoint is of step {max(steps)}" if steps else "it has no checkpoint yet"
