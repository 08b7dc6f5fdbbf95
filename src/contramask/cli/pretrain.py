"""`contramask pretrain`: one YAML in, one run directory out; interrupted and continued at will."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from jsonargparse import Namespace
from lightning_fabric.utilities.exceptions import MisconfigurationException

from contramask.callbacks.analysis import AnalysisCallback
from contramask.callbacks.balance import Balance
from contramask.callbacks.checkpoint import Checkpoints
from contramask.callbacks.export import Export
from contramask.callbacks.finite import FiniteLoss
from contramask.callbacks.online_probes import OnlineProbes
from contramask.callbacks.pictures import Pictures
from contramask.callbacks.preemption import (
    Preemption,
    environment_plugins,
    keep_lightning_off_signals,
)
from contramask.callbacks.progress import Progress
from contramask.callbacks.throughput import Throughput
from contramask.callbacks.watchdog import Watchdog
from contramask.checkpoints.differences import FREE
from contramask.checkpoints.runs import Run, has_checkpoint, latest, open_run, run_name
from contramask.cli.parser import ConfigFile, Parser
from contramask.cli.quiet import settle
from contramask.cli.recipes import recipes
from contramask.data.module import ImageShards
from contramask.tracking.jsonl import JSONLLogger
from contramask.tracking.wandb import Tracker, make_wandb
from contramask.training.plan import check_length
from contramask.training.pretraining import Pretraining
from contramask.types import UserError

log = logging.getLogger(__name__)

# Observers leave training bitwise as it is, so their settings may change when a run goes on.
OBSERVERS = (
    "checkpoint*", "online*", "analysis*", "pictures*", "balance*", "watchdog*", "export*", "wandb*"
)  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Parse, open the run directory, train, export."""
    if "--list" in argv:
        recipes()
        return
    settle()
    parser = build_parser()
    pretrain(parser, parser.parse_args(list(argv)))


def build_parser() -> Parser:
    """The options of pretraining: a model, data, a trainer, and who watches."""
    parser = Parser(prog="contramask pretrain", description=__doc__)
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
    parser.add_class_arguments(Pretraining, "model", skip={"seed"}, sub_configs=True)
    parser.add_class_arguments(ImageShards, "data", skip={"seed"}, sub_configs=True)
    parser.add_class_arguments(
        pl.Trainer,
        "trainer",
        skip={"logger", "enable_progress_bar", "gradient_clip_val", "gradient_clip_algorithm"},
        fail_untyped=False,
        instantiate=False,
        sub_configs=True,
    )
    parser.add_class_arguments(Checkpoints, "checkpoint", skip={"folder"})
    parser.add_class_arguments(Export, "export", skip={"folder", "data"})
    parser.add_class_arguments(OnlineProbes, "online")
    parser.add_class_arguments(AnalysisCallback, "analysis", skip={"folder"})
    parser.add_class_arguments(Pictures, "pictures", skip={"folder"})
    parser.add_class_arguments(Balance, "balance")
    parser.add_class_arguments(Watchdog, "watchdog", skip={"folder"})
    parser.add_function_arguments(make_wandb, "wandb", skip={"run_dir", "config", "name"})
    parser.set_defaults(_defaults())
    return parser


def _defaults() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "trainer.precision": "bf16-mixed" if cuda else "32-true",
        "trainer.sync_batchnorm": cuda,  # torch has none for CPUs
        "trainer.log_every_n_steps": 20,
        "trainer.use_distributed_sampler": False,
        "trainer.enable_model_summary": False,
        "trainer.enable_autolog_hparams": False,
        "trainer.num_sanity_val_steps": 0,
        "trainer.limit_val_batches": 0,
        "checkpoint.monitor": "val/knn20_top1",
    }


def pretrain(parser: Parser, config: Namespace) -> Run:
    """Train as the configuration says; continue the run of its name if there is one."""
    resolved = {k: v for k, v in parser.plain(config).items() if k not in ("config", "list")}
    check_length(config.trainer.max_steps)
    run = _run(config, resolved)
    pl.seed_everything(config.seed, workers=False, verbose=False)
    config.model.seed = config.data.seed = config.seed
    parts = parser.build(config)
    patch = parts.model.backbone.spec.patch
    parts.data.images = replace(images := parts.data.images, min_side=max(images.min_side, patch))
    trainer = _trainer(parts, run, resolved)
    keep_lightning_off_signals(trainer)
    log.info("run %s\n%s", run.path, parts.model.describe())
    checkpoint = str(run.checkpoint) if run.checkpoint else None
    trainer.fit(parts.model, parts.data, ckpt_path=checkpoint, weights_only=True)
    return run


def _run(config: Namespace, resolved: dict[str, Any]) -> Run:
    """The run directory, by name or by what is there to be continued."""
    root, source = Path(config.root), config.config[-1] if config.config else None
    free = (*FREE, *OBSERVERS)
    name = run_name(config.name, Path(str(source)) if source else None)
    if config.resume is True and config.name is None and not has_checkpoint(root / name):
        name = latest(root, Path(str(source)).stem if source else "run", resolved, free=free)
    try:
        return open_run(root, name, resolved, resume=config.resume, free=free)
    except OSError as error:
        raise UserError(
            f"run directory {root / name} cannot be made ({error.strerror}); set --root to a "
            "directory that can be written"
        ) from error


def _trainer(parts: Namespace, run: Run, resolved: dict[str, Any]) -> pl.Trainer:
    arguments = parts.trainer.as_dict()
    parts.checkpoint.folder = run.checkpoints
    parts.pictures.folder = run.path / "pictures"
    parts.analysis.folder = run.path / "analysis"
    parts.watchdog.folder = parts.export.folder = run.path
    images = parts.data.images
    parts.export.data = {k: getattr(images, k) for k in ("size", "resize", "mean", "std")}
    tracker = make_wandb(run.path, name=run.name, config=resolved, **parts.wandb.as_dict())
    preemption = Preemption()
    if isinstance(tracker, Tracker):
        preemption.before_exit.append(tracker.mark_preempting)
    # FiniteLoss first: the others should not meet features that are not finite.
    watching = [FiniteLoss(), parts.online, parts.analysis, parts.pictures, parts.balance]
    arguments["callbacks"] = [
        *watching,
        parts.watchdog,
        Throughput(),
        Progress(),
        parts.export,
        *(arguments["callbacks"] or []),
        parts.checkpoint,
        preemption,
    ]
    arguments["plugins"] = [*(arguments["plugins"] or []), *environment_plugins()]
    try:
        return pl.Trainer(**arguments, logger=[JSONLLogger(run.path), tracker])
    except MisconfigurationException as error:
        raise UserError(f"trainer: {error}; correct the options under --trainer") from error
