"""What all probes of the command line share: a model, its images, a trainer, where results go."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from jsonargparse import Namespace
from lightning_fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.table import Table

from contramask.checkpoints.sources import Source
from contramask.cli.parser import Parser
from contramask.cli.quiet import settle
from contramask.data.examples import Images
from contramask.data.module import ImageShards
from contramask.data.views import IMAGENET_MEAN, IMAGENET_STD
from contramask.models.backbone import Backbone
from contramask.models.digest import digest_of
from contramask.probes.features import Feature, Norm, Pool
from contramask.types import UserError

# What `--images` may set where nothing else is said: all fields of `Images`.
ALL = tuple(field.name for field in fields(Images))


def probe_parser(
    kind: str, about: str | None, *, data: bool = True, images: Sequence[str] = ALL
) -> Parser:
    """A parser with the options of every probe.

    Args:
        kind: the word after `contramask probe`.
        about: the docstring of the module.
        data: whether the probe reads shards through `ImageShards`.
        images: the fields of `--images` that it reads; `open_model` refuses the others.
    """
    parser = Parser(prog=f"contramask probe {kind}", description=about)
    parser.add_argument("-c", "--config", action="config", help="a YAML file")
    parser.add_argument("--run", type=str, required=True, help="a run, an export, official weights")
    parser.add_argument("--out", type=Path | None, help="the result; default RUN/probes/NAME.json")
    add_images(parser, images)
    if data:
        parser.add_class_arguments(ImageShards, "data", skip={"seed", "views", "images"})
        parser.add_argument("--limit", type=int | None, help="the most images of each split")
    parser.add_class_arguments(
        pl.Trainer,
        "trainer",
        skip={"logger", "callbacks"},
        fail_untyped=False,
        instantiate=False,
    )
    parser.set_defaults({"trainer.use_distributed_sampler": False})
    return parser


def add_images(parser: Parser, allowed: Sequence[str] = ALL) -> None:
    """`--images.size` and other fields of `Images`, each by default as the run was fed."""
    about = f"{', '.join(allowed)}; what is not given is as the run was fed"
    parser.add_argument("--images", type=dict[str, Any] | None, help=about)


def images_of(
    sheet: Mapping[str, Any],
    given: Mapping[str, Any] | None,
    patch: int,
    allowed: Sequence[str] = ALL,
) -> Images:
    """How a model is fed.

    Args:
        sheet: how it was fed in training.
        given: what is to be different.
        patch: of the model; smaller images are bad.
        allowed: the fields that are read; without `size` any size in training will do.

    Raises:
        UserError: for a field that is not read, or images of no whole number of patches.
    """
    known = {key: sheet[key] for key in ("size", "resize", "mean", "std") if key in sheet}
    changes = dict(given or {})
    for name in changes:
        if name not in allowed:
            raise UserError(
                f"images.{name} is given; allowed are {', '.join(allowed)}; set "
                f"--images.{allowed[0]}, ..."
            )
    if "size" in changes and "resize" not in changes:
        known["resize"] = None  # in proportion
    merged = {**known, **changes}
    merged |= {key: tuple(map(float, merged[key])) for key in ("mean", "std") if key in merged}
    try:
        fed = Images(**merged)
        whole = "size" not in allowed or fed.size % patch == 0
    except TypeError as error:
        raise UserError(f"images: {error}; given {changes}; set --images") from error
    if not whole:
        raise UserError(
            f"images of {fed.size} pixels are no whole number of patches of {patch}; set "
            "--images.size to a multiple"
        )
    return replace(fed, min_side=max(fed.min_side, patch))


def add_feature(parser: Parser) -> None:
    """`--source`, `--pool` and `--norm`, see `Feature`."""
    default = Feature()
    parser.add_argument("--source", type=str, default=default.source, help="last, last4, block_07")
    parser.add_argument("--pool", type=Pool, default=default.pool, help="tokens to one vector")
    parser.add_argument("--norm", type=Norm, default=default.norm, help="the backbone's, or none")


def feature_of(config: Namespace) -> Feature:
    """What the options of `add_feature` say."""
    return Feature(config.source, config.pool, config.norm)


def positional(argv: Sequence[str]) -> list[str]:
    """`probe knn RUN ...` and `probe knn ... --run RUN` are the same."""
    given = list(argv)
    return ["--run", *given] if given and not given[0].startswith("-") else given


def normalised(images: Images) -> str:
    """The end of a transform's words: `, normalised by ...`; nothing where that is ImageNet's."""
    if (images.mean, images.std) == (IMAGENET_MEAN, IMAGENET_STD):
        return ""
    mean, std = (f"({', '.join(f'{x:g}' for x in row)})" for row in (images.mean, images.std))
    return f", normalised by mean {mean}, std {std}"


@dataclass
class Opened:
    """A model, ready to be probed.

    Attributes:
        source: what was given.
        backbone: loaded, on the CPU, without gradient.
        images: how it is fed: sizes and normalisation.
        about: `run`, `step`, `net` and `backbone`, a checksum of its weights: goes into results.
    """

    source: Source
    backbone: Backbone
    images: Images
    about: dict[str, Any]

    @property
    def transform(self) -> str:
        """How an image becomes the clean view, for a protocol."""
        size = self.images.size
        resize = self.images.resize or round(size * 8 / 7)
        return f"resize {resize}, centre crop {size}{normalised(self.images)}"

    @property
    def folder(self) -> Path:
        """Where results go: `probes` in the run, or beside a file."""
        path = self.source.path
        return path / "probes" if path.is_dir() else path.parent / f"{path.stem}-probes"


def open_model(
    text: str, images: Mapping[str, Any] | None = None, allowed: Sequence[str] = ALL
) -> Opened:
    """Load what `--run` names.

    Args:
        text: a run, an export, official weights.
        images: how it is fed, where that is not as in training; see `images_of`.
        allowed: the fields of `images` that are read.

    Raises:
        UserError: nothing is there, or images cannot be so.
    """
    source = Source.parse(text)
    backbone, about = source.load()
    backbone.requires_grad_(requires_grad=False)
    fed = images_of(about["data"], images, backbone.spec.patch, allowed)
    known = {"run": str(source.path), "step": about["step"], "net": about["net"]}
    return Opened(source, backbone, fed, {**known, "backbone": digest_of(backbone)})


def make_trainer(arguments: Mapping[str, Any]) -> pl.Trainer:
    """A trainer that evaluates: no logger, no checkpoints, a progress bar.

    Raises:
        UserError: for options that Lightning refuses, or weights that are not float32.
    """
    settle()
    quiet = {"enable_checkpointing": False, "logger": False, "enable_model_summary": False}
    try:
        trainer = pl.Trainer(**{**arguments, **quiet})
    except MisconfigurationException as error:
        raise UserError(f"trainer: {error}; correct the options under --trainer") from error
    if trainer.precision.endswith("-true") and trainer.precision != "32-true":
        # Images would be rounded too, before anything reads them.
        raise UserError(
            f"trainer: precision is {trainer.precision}; features are float32: allowed are 32-true "
            "and, for faster forwards, bf16-mixed; set --trainer.precision bf16-mixed"
        )
    return trainer


def parts_of(out: Path) -> Path:
    """Where the finished parts of a result are kept, beside it: `a.json.parts`.

    The whole name counts, so it is never the result's own, nor that of `a.v2.json`.
    """
    return out.with_name(f"{out.name}.parts")


def write_result(result: Mapping[str, Any], out: Path) -> None:
    """One JSON file. Raises `UserError` if it cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", "utf-8")
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror}); set --out to a file that can"
        ) from error


# Names of values that are fractions and are shown in per cent end in one of these.
SHARES = ("top1", "top5", "miou", "map", "_rate")


def is_share(name: str) -> bool:
    """Whether a value of this name is a fraction that is shown in per cent."""
    return name.endswith(SHARES)


def show_result(result: Mapping[str, Any], out: Path) -> None:
    """A table of `values`, the protocol, and where they are written."""
    table = Table(title=f"{result['probe']} probe of {result['run']}", title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    for name, value in result["values"].items():
        table.add_row(name, f"{100 * value:.2f} %" if is_share(name) else f"{value:g}")
    console = Console()
    console.print(table)
    console.print(f"protocol: {result['protocol']}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"written to {out}", highlight=False, markup=False, soft_wrap=True)
