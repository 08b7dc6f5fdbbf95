"""`contramask finetune`: all weights of a pretrained model learn to name classes."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from jsonargparse import Namespace

from contramask.callbacks.analysis import AnalysisCallback
from contramask.callbacks.preemption import keep_lightning_off_signals
from contramask.callbacks.validation import Validation
from contramask.checkpoints.classifiers import save_classifier
from contramask.checkpoints.runs import Run
from contramask.checkpoints.sources import Source
from contramask.cli.parser import Parser
from contramask.cli.probing import (
    add_images,
    images_of,
    positional,
    show_result,
    write_result,
)
from contramask.cli.quiet import settle
from contramask.cli.recipes import folder, recipes
from contramask.cli.running import add_run, add_trainer, make_trainer, open_named
from contramask.data.index import classes_of
from contramask.data.subset import Subset
from contramask.data.supervised import LabelledShards
from contramask.models.classifier import Classifier
from contramask.models.digest import digest_of
from contramask.optim import Optim, Rule
from contramask.schedule import Schedule
from contramask.training.finetuning import FineTuning
from contramask.types import UserError

log = logging.getLogger(__name__)

# Observers leave training bitwise as it is, so their settings may change when a run goes on.
OBSERVERS = ("checkpoint*", "drift*", "validate_every", "wandb*", "preset", "out")
LOOKS = 10  # at the drift in a whole training, unless --drift_every says otherwise


def main(argv: Sequence[str]) -> None:
    """Parse, open the run directory, train, score, export."""
    if "--list" in argv:
        recipes("finetune")
        return
    settle()
    parser, given = build_parser(), positional(argv)
    config = parser.parse_args(given)
    if config.preset is not None:  # on the command line or in a file: in front of all else
        config = parser.parse_args(["-c", str(preset(config.preset)), *given])
    if not config.config:
        raise UserError(
            f"a fine-tuning needs a recipe: --preset {' or '.join(presets())}, or -c FILE.yaml"
        )
    finetune(parser, config)


def presets() -> list[str]:
    """The names of the recipes that come with contramask."""
    return sorted(path.stem for path in (folder() / "finetune").glob("*.yaml"))


def preset(name: str) -> Path:
    """Its file. Raises `UserError` if there is none."""
    if name not in presets():
        raise UserError(f"no preset {name!r}; there are {', '.join(presets())}; set --preset")
    return folder() / "finetune" / f"{name}.yaml"


def build_parser() -> Parser:
    """The options of fine-tuning: what, on which data, how, and who watches."""
    parser = Parser(prog="contramask finetune", description=__doc__)
    add_run(parser)
    parser.add_argument("--run", type=str, required=True, help="a run, an export, official weights")
    parser.add_argument(
        "--backbone", type=str | None, help="checksum of the weights to start from; set by itself"
    )
    parser.add_argument("--preset", type=str | None, help=f"a recipe: {', '.join(presets())}")
    parser.add_argument(
        "--out", type=Path | None, help="the result; default: result.json in the run directory"
    )
    parser.add_argument("--epochs", type=float, default=100.0, help="of the (part of the) data")
    parser.add_argument(
        "--validate_every", type=float, default=1.0, help="epochs; 0: only at the end"
    )
    parser.add_argument("--subset", type=float | None, help="this fraction of each class")
    parser.add_argument("--per_class", type=int | None, help="so many images of each class")
    parser.add_argument(
        "--subset_file", type=str | None, help="the keys of the images, a line each"
    )
    parser.add_argument("--subset_seed", type=int, default=0, help="of the choice of the part")
    parser.add_argument("--drift", type=bool, default=False, help="CKA to the pretrained weights")
    parser.add_argument(
        "--drift_anchor", type=list[str] | None, help="CKA to these models too, NAME=RUN or RUN"
    )
    parser.add_argument("--drift_every", type=int | None, help="updates; default: 10 times in all")
    add_images(parser)
    parser.add_class_arguments(
        FineTuning, "model", skip={"backbone", "classes", "size", "seed"}, instantiate=False
    )
    parser.add_class_arguments(
        LabelledShards, "data", skip={"seed", "images", "subset"}, instantiate=False
    )
    add_trainer(parser)
    parser.set_defaults({"checkpoint.monitor": "val/top1", "trainer.max_epochs": -1})
    return parser


def finetune(parser: Parser, config: Namespace) -> Run:
    """Train as the configuration says; continue the run of its name if there is one."""
    resolved = {k: v for k, v in parser.plain(config).items() if k not in ("config", "list")}
    if config.epochs <= 0 or config.validate_every < 0:
        raise UserError(
            f"--epochs is {config.epochs:g} and --validate_every {config.validate_every:g}; epochs "
            "are above 0, validation is every so many of them, 0: only at the end"
        )
    if config.out is not None and config.name is None:  # a directory of the file's name
        config.root, config.name = str(config.out.parent), config.out.stem
    subset = Subset(config.subset, config.per_class, config.subset_file, config.subset_seed)
    source = Source.parse(config.run)
    backbone, sheet = source.load()
    about = {"run": str(source.path), "step": sheet["step"], "net": sheet["net"]}
    about["backbone"] = resolved["backbone"] = digest_of(backbone)
    _check_weights(config.backbone, about["backbone"], source.path)
    stem = Path(f"finetune-{Path(str(config.config[-1])).stem}")
    run = open_named(config, resolved, stem, OBSERVERS)
    pl.seed_everything(config.seed, workers=False, verbose=False)
    parts = parser.build(config)
    images = images_of(sheet["data"], config.images, backbone.spec.patch)
    data = LabelledShards(**parts.data.as_dict(), seed=config.seed, images=images, subset=subset)
    model = FineTuning(
        backbone,
        data.num_classes,
        size=images.size,
        seed=config.seed,
        **parts.model.as_dict(),
    )
    trainer, validation = _trainer(parts, run, resolved, data)
    log.info("run %s\n%s\n%d updates", run.path, model.describe(), trainer.max_steps)
    checkpoint = str(run.checkpoint) if run.checkpoint else None
    trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
    if trainer.is_global_zero:
        result = _leave(run, model, data, validation, about, trainer)
        out = config.out or run.path / "result.json"
        write_result(result, out)
        show_result(result, out)
    return run


def _check_weights(expected: str | None, found: str, path: Path) -> None:
    """A configuration that was saved insists on the weights it was made for."""
    if expected not in (None, found):
        raise UserError(
            f"{path} has other weights now than this configuration was made for (--backbone "
            f"{expected[:8]}..., found {found[:8]}...); give the weights of then, or leave "
            "--backbone out and start another run"
        )


def _trainer(
    parts: Namespace, run: Run, resolved: dict[str, Any], data: LabelledShards
) -> tuple[pl.Trainer, Validation]:
    trainer = make_trainer(parts, run, resolved, watching=())
    keep_lightning_off_signals(trainer)
    # How many ranks there are is known now, and with it how many updates an epoch has.
    images = data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    assert data.num_train is not None
    epoch = data.num_train / images
    if trainer.max_steps < 1:
        trainer.fit_loop.epoch_loop.max_steps = max(1, round(parts.epochs * epoch))
    every = max(1, round(parts.validate_every * epoch)) if parts.validate_every else 0
    validation = Validation(every)
    watching: list[pl.Callback] = [validation]
    anchors = {Source.parse(path).name: path for path in parts.drift_anchor or ()}
    if parts.drift or anchors:
        looks = parts.drift_every or max(1, trainer.max_steps // LOOKS)
        watching.append(AnalysisCallback(run.path / "analysis", every=looks, anchors=anchors))
    # Behind FiniteLoss, before the checkpoints: what was found belongs into the one of its step.
    trainer.callbacks[1:1] = watching  # pyright: ignore[reportAttributeAccessIssue]
    return trainer, validation


def _leave(
    run: Run,
    model: FineTuning,
    data: LabelledShards,
    validation: Validation,
    about: dict[str, Any],
    trainer: pl.Trainer,
) -> dict[str, Any]:
    """What a fine-tuning hands on: backbone and head, of the average too, and the result."""
    names = classes_of(data.train_shards.urls)
    for prefix, net in model.nets.items():
        classifier = net if isinstance(net, Classifier) else net.get_submodule("module")
        assert isinstance(classifier, Classifier)
        save_classifier(
            classifier,
            run.path / prefix.rstrip("_"),
            step=trainer.global_step,
            data=asdict(data.images),
            classes=names,
            origin={"finetuned": about},
        )
    if validation.step != trainer.global_step:
        raise UserError(
            f"{run.path} was trained for {trainer.global_step} updates and not scored after the "
            "last; start another run, or lengthen this one"
        )
    numbers = {"values": validation.values, "updates": trainer.global_step}
    protocol = _protocol(model, data, trainer)
    return {"probe": "finetune", **about, **numbers, "protocol": protocol}


def _protocol(model: FineTuning, data: LabelledShards, trainer: pl.Trainer) -> str:
    """One line that says all that is needed to get the number again."""
    images, config = data.images, model.backbone.config
    batch = data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    epochs = data.epoch_of(trainer.global_step * batch) or 0.0
    resize = images.resize or round(images.size * 8 / 7)
    return (
        f"all weights, {'mean of patches' if model.classifier.pool == 'mean' else 'class token'}, "
        f"{data.num_classes} classes; {data.num_train} images ({data.subset.about()}), "
        f"{epochs:.1f} epochs at batch {batch}; {_words(model.optim)}, drop path "
        f"{config['timm']['drop_path_rate']:g}, average of weights {model.ema or 'none'}; "
        f"{data.augment.about()}; seed {model.seed}; scored after the last update at resize "
        f"{resize}, centre crop {images.size}"
    )


def _words(optim: Optim) -> str:
    rate = optim.lr if isinstance(optim.lr, Schedule) else Schedule(optim.lr, shape="constant")
    meant = f" for {optim.batch} images, {optim.scaling}" if optim.batch else ""
    clip = "none" if optim.clip is None else optim.clip
    return (
        f"{optim.name} {optim.betas}, lr {rate.peak:g}{meant} (warm-up {rate.warmup:g}, then "
        f"{rate.shape} to {rate.end:g}), layer decay {optim.layer_decay:g}, weight decay "
        f"{optim.decay} but for {'; '.join(map(_rule, optim.rules)) or 'nothing'}, clip {clip}"
    )


def _rule(rule: Rule) -> str:
    where = rule.pattern or (f"up to {rule.ndim} dimensions" if rule.ndim else "all")
    return f"{where} (lr x {rule.lr:g}, decay x {rule.decay:g})"
