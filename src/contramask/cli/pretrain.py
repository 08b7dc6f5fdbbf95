"""`contramask pretrain`: one YAML in, one run directory out; interrupted and continued at will."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from jsonargparse import Namespace

from contramask.callbacks.analysis import AnalysisCallback
from contramask.callbacks.balance import Balance
from contramask.callbacks.export import Export
from contramask.callbacks.online_probes import OnlineProbes
from contramask.callbacks.pictures import Pictures
from contramask.callbacks.preemption import keep_lightning_off_signals
from contramask.callbacks.watchdog import Watchdog
from contramask.checkpoints.runs import Run
from contramask.cli.parser import Parser
from contramask.cli.quiet import settle
from contramask.cli.recipes import recipes
from contramask.cli.running import add_run, add_trainer, make_trainer, open_named
from contramask.data.module import ImageShards
from contramask.training.plan import check_length
from contramask.training.pretraining import Pretraining

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
    add_run(parser)
    parser.add_class_arguments(Pretraining, "model", skip={"seed"}, sub_configs=True)
    parser.add_class_arguments(ImageShards, "data", skip={"seed"}, sub_configs=True)
    add_trainer(parser)
    parser.add_class_arguments(Export, "export", skip={"folder", "data"})
    parser.add_class_arguments(OnlineProbes, "online")
    parser.add_class_arguments(AnalysisCallback, "analysis", skip={"folder"})
    parser.add_class_arguments(Pictures, "pictures", skip={"folder"})
    parser.add_class_arguments(Balance, "balance")
    parser.add_class_arguments(Watchdog, "watchdog", skip={"folder"})
    parser.set_defaults({"checkpoint.monitor": "val/knn20_top1"})
    return parser


def pretrain(parser: Parser, config: Namespace) -> Run:
    """Train as the configuration says; continue the run of its name if there is one."""
    resolved = {k: v for k, v in parser.plain(config).items() if k not in ("config", "list")}
    check_length(config.trainer.max_steps)
    source = Path(str(config.config[-1])) if config.config else None
    run = open_named(config, resolved, source, OBSERVERS)
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


def _trainer(parts: Namespace, run: Run, resolved: dict[str, Any]) -> pl.Trainer:
    parts.pictures.folder = run.path / "pictures"
    parts.analysis.folder = run.path / "analysis"
    parts.watchdog.folder = parts.export.folder = run.path
    images = parts.data.images
    parts.export.data = {k: getattr(images, k) for k in ("size", "resize", "mean", "std")}
    watching = [parts.online, parts.analysis, parts.pictures, parts.balance, parts.watchdog]
    return make_trainer(parts, run, resolved, watching=watching, last=[parts.export])
