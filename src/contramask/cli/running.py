"""What verbs that train share: options of a run, its directory, a trainer with all that watches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from jsonargparse import Namespace
from lightning_fabric.utilities.exceptions import MisconfigurationException

from contramask.callbacks.checkpoint import Checkpoints
from contramask.callbacks.finite import FiniteLoss
from contramask.callbacks.preemption import Preemption, environment_plugins
from contramask.callbacks.progress import Progress
from contramask.callbacks.throughput import Throughput
from contramask.checkpoints.differences import FREE
from contramask.checkpoints.runs import Run, has_checkpoint, latest, open_run, run_name
from contramask.cli.parser import ConfigFile, Parser
from contramask.tracking.jsonl import JSONLLogger
from contramask.tracking.wandb import Tracker, make_wandb
from contramask.types import UserError


def add_run(parser: Parser) -> None:
    """Configuration files, and where the run is: `--name`, `--root`, `--resume`, `--seed`."""
    parser.add_argument("-c", "--config", action=ConfigFile, help="a YAML file; later ones win")
    parser.add_argument("--name", type=str | None, help="of the run; default: job id or time")
    parser.add_argument("--root", type=str, default="runs", help="the directory of all runs")
    parser.add_argument(
        "--resume",
        type=bool | Literal["auto"],
        nargs="?",
        const=True,
        default="auto",
        help="auto: continue the run of this name if it exists; true or no word: insist, and "
        "without --name find the newest of this configuration; false: refuse",
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random")
    parser.add_argument("--list", action="store_true", help="show all recipes with a line each")


def add_trainer(parser: Parser) -> None:
    """`--trainer`, `--checkpoint` and `--wandb`, with the defaults of training here."""
    parser.add_class_arguments(
        pl.Trainer,
        "trainer",
        skip={"logger", "enable_progress_bar", "gradient_clip_val", "gradient_clip_algorithm"},
        fail_untyped=False,
        instantiate=False,
        sub_configs=True,
    )
    parser.add_class_arguments(Checkpoints, "checkpoint", skip={"folder"})
    parser.add_function_arguments(make_wandb, "wandb", skip={"run_dir", "config", "name"})
    cuda = torch.cuda.is_available()
    parser.set_defaults(
        {
            "trainer.precision": "bf16-mixed" if cuda else "32-true",
            "trainer.sync_batchnorm": cuda,  # torch has none for CPUs
            "trainer.log_every_n_steps": 20,
            "trainer.use_distributed_sampler": False,
            "trainer.enable_model_summary": False,
            "trainer.enable_autolog_hparams": False,
            "trainer.num_sanity_val_steps": 0,
            "trainer.limit_val_batches": 0,
        }
    )


def open_named(
    config: Namespace, resolved: dict[str, Any], source: Path | None, observers: Sequence[str]
) -> Run:
    """The run directory, by name or by what is there to be continued.

    Args:
        config: with the options of `add_run`.
        resolved: the whole configuration as plain values.
        source: what the run is named after, if it has no name.
        observers: keys that may change when a run goes on.
    """
    root, free = Path(config.root), (*FREE, *observers)
    name = run_name(config.name, source)
    if config.resume is True and config.name is None and not has_checkpoint(root / name):
        name = latest(root, source.stem if source else "run", resolved, free=free)
    try:
        return open_run(root, name, resolved, resume=config.resume, free=free)
    except OSError as error:
        raise UserError(
            f"run directory {root / name} cannot be made ({error.strerror}); set --root to a "
            "directory that can be written"
        ) from error


def make_trainer(
    parts: Namespace,
    run: Run,
    resolved: dict[str, Any],
    *,
    watching: Sequence[pl.Callback],
    last: Sequence[pl.Callback] = (),
) -> pl.Trainer:
    """A trainer that logs, shows where it is, saves, and goes on after it was stopped.

    Args:
        parts: with `trainer`, `checkpoint` and `wandb` of `add_trainer`.
        run: its directory.
        resolved: for the tracker.
        watching: callbacks that look at every update.
        last: callbacks after those.

    Raises:
        UserError: options that contradict each other.
    """
    arguments = parts.trainer.as_dict()
    parts.checkpoint.folder = run.checkpoints
    tracker = make_wandb(run.path, name=run.name, config=resolved, **parts.wandb.as_dict())
    preemption = Preemption()
    if isinstance(tracker, Tracker):
        preemption.before_exit.append(tracker.mark_preempting)
    arguments["callbacks"] = [
        FiniteLoss(),  # first: the others should not meet features that are not finite
        *watching,
        Throughput(),
        Progress(),
        *last,
        *(arguments["callbacks"] or []),
        parts.checkpoint,
        preemption,
    ]
    arguments["plugins"] = [*(arguments["plugins"] or []), *environment_plugins()]
    try:
        return pl.Trainer(**arguments, logger=[JSONLLogger(run.path), tracker])
    except MisconfigurationException as error:
        raise UserError(f"trainer: {error}; correct the options under --trainer") from error
