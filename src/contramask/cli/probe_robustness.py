"""`contramask probe robustness`: a probe on degraded images, and shape against texture.

With --data.train and --data.val: probes are fitted on clean images of train and score val under
each of --degradations: clean, noise20 (sigma / 255), blur4 (sigma in pixels), freq0.5 or
freq0.5eps0.7 (noise in a band around 0.5 pi), lowpass8, highpass8 (cycles per image), shuffle4 (a
grid of 4 x 4 patches). With --cue.data: how well shape and texture of cue-conflict images are
read; with --cue.train, photographs of classes of the same names, also the shape bias.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from contramask.cli.parser import Parser
from contramask.cli.probing import (
    Opened,
    add_feature,
    feature_of,
    make_trainer,
    open_model,
    positional,
    probe_parser,
    show_result,
    write_result,
)
from contramask.cli.robustness_tables import accuracies_of, draw, joined, others, show_tables
from contramask.data.cues import CueShards, NamedShards, Patterns
from contramask.data.index import classes_of
from contramask.data.module import ImageShards
from contramask.data.streaming import Streaming
from contramask.functional.degradations import sweep
from contramask.models.digest import digest_of
from contramask.probes.evaluation import Split as DataSplit
from contramask.probes.linear import LinearRecipe
from contramask.probes.parts import Parts
from contramask.probes.robustness import Split
from contramask.training.cues import CueStudy, shape_and_texture
from contramask.training.robustness import Sweep, degraded_accuracies
from contramask.training.unstored import shards_of
from contramask.types import UserError

FORMAT = "robustness 2"  # of what is kept; raised when the same settings give other numbers


@dataclass(frozen=True)
class Data:
    """Where images for the degradations are, and how all images are read.

    Attributes:
        train: labelled shards on which probes are fitted.
        val: labelled shards that are degraded.
        batch_size: images of a batch on one rank.
        workers: processes a rank that decode.
        streaming: how shards are read.
    """

    train: Patterns | None = None
    val: Patterns | None = None
    batch_size: int = 256
    workers: int = 8
    streaming: Streaming | None = None


@dataclass(frozen=True)
class Cue:
    """Shape against texture.

    Attributes:
        data: cue-conflict shards: json with shape and texture, classes.json beside them.
        train: labelled photographs of classes with the same names, for the shape bias.
        folds: of the cross-validation.
        split: what no fold shares with another: `source` pictures of the decoded cue (where keys
            name them as in cat3-dog2), classes of the `other` cue, or nothing (`random`). Default:
            the first of these that the images allow.
    """

    data: Patterns | None = None
    train: Patterns | None = None
    folds: int = 5
    split: Split | None = None


def main(argv: Sequence[str]) -> None:
    """Probe; print the result and write it beside the run."""
    parser = build_parser()
    config = parser.parse_args(positional(argv))
    _check(config.data, config.cue, config.degradations)
    beside = [accuracies_of(path) for path in config.beside]
    opened = open_model(config.run, config.images)
    given = parser.build(config)
    job = _Job(opened, given, feature_of(config), make_trainer(given.trainer.as_dict()))
    out = config.out or opened.folder / f"robustness-{job.name}.json"
    found: list[dict[str, Any]] = []
    if given.data.train is not None:
        found.append(job.degradations(out))
    if given.cue.data is not None:
        found.append(job.cues(out))
    if job.trainer.is_global_zero:
        result = joined({"probe": "robustness", **opened.about}, found)
        write_result(result, out)
        show_tables(result)
        show_result({**result, "values": others(result)}, out)
        draw(result, beside, out)


def build_parser() -> Parser:
    """The options."""
    parser = probe_parser("robustness", __doc__, data=False)
    add_feature(parser)
    parser.add_class_arguments(Data, "data")
    parser.add_argument("--limit", type=int | None, help="the most images of each set")
    parser.add_argument(
        "--degradations", type=list[str] | None, help="words; default: a sweep that fits the size"
    )
    parser.add_argument("--k", type=int | None, help="also the k nearest neighbours")
    parser.add_class_arguments(LinearRecipe, "recipe")
    parser.add_class_arguments(Cue, "cue")
    parser.add_argument("--seed", type=int, default=0, help="of degradations and folds")
    parser.add_argument(
        "--beside", type=list[Path], default=[], help="results of others, for the figure"
    )
    return parser


@dataclass
class _Job:
    """What both halves of the command share."""

    opened: Opened
    given: Any
    feature: Any
    trainer: pl.Trainer

    @property
    def name(self) -> str:
        return str(self.feature).replace("/", "-").replace("+", "-")

    def degradations(self, out: Path) -> dict[str, Any]:
        given, images = self.given, self.opened.images
        data = ImageShards(given.data.train, val=given.data.val, **self._reading())
        work = Sweep(
            sweep(images.size) if given.degradations is None else given.degradations,
            images.size,
            images.mean,
            images.std,
            recipe=given.recipe,
            feature=self.feature,
            k=given.k,
            seed=given.seed,
            limit=given.limit,
        )
        parts = self._parts(out, "degradations", [(data, "train"), (data, "val")], given.k)
        return degraded_accuracies(
            self.trainer,
            self.opened.backbone,
            data,
            work,
            parts=parts,
            transform=self.opened.transform,
        )

    def cues(self, out: Path) -> dict[str, Any]:
        given, cue = self.given, self.given.cue
        study = CueStudy(
            recipe=given.recipe,
            feature=self.feature,
            folds=cue.folds,
            split=cue.split,
            seed=given.seed,
            limit=given.limit,
        )
        photographs = (
            None
            if cue.train is None
            else NamedShards(cue.train, option="cue.train", **self._reading())
        )
        images = CueShards(cue.data, option="cue.data", **self._reading())
        read = [data for data in (images, photographs) if data is not None]
        return shape_and_texture(
            self.trainer,
            self.opened.backbone,
            images,
            study,
            photographs=photographs,
            parts=self._parts(out, "cues", [(data, "train") for data in read], cue.folds),
            transform=self.opened.transform,
        )

    def _reading(self) -> dict[str, Any]:
        data = self.given.data
        shared = {"batch_size": data.batch_size, "workers": data.workers}
        return {**shared, "images": self.opened.images, "streaming": data.streaming}

    def _parts(
        self, out: Path, half: str, read: Sequence[tuple[ImageShards, DataSplit]], *settings: Any
    ) -> Parts | None:
        """What is done already: kept by the first rank, which tells the others.

        Nothing is kept of pipes: nobody knows whether they give the same again.
        """
        given, trainer = self.given, self.trainer
        # On all ranks: missing shards are told on all.
        held = [_held(data, split, given.limit, trainer.world_size) for data, split in read]
        if not trainer.is_global_zero or None in held:
            return None
        run = (FORMAT, str(trainer.precision), trainer.limit_val_batches)
        hangs_on = (self.feature, self.opened.images, given.recipe, given.seed, given.limit)
        digest = digest_of(self.opened.backbone, *run, *hangs_on, held, *settings)
        return Parts(out.with_name(f"{out.stem}-{half}.parts"), digest)


def _held(data: ImageShards, split: DataSplit, limit: int | None, ranks: int) -> Any:
    """Which images a split has and the names of their classes; None where nobody knows."""
    shards = data.train_shards if split == "train" else data.val_shards
    assert shards is not None
    if any(url.startswith("pipe:") for url in shards.urls):
        return None
    return shards_of(data, split, limit, ranks), classes_of(shards.urls)


def _check(data: Any, cue: Any, degradations: list[str] | None) -> None:
    """Raise `UserError` where options ask for nothing, or for half of something."""
    if data.train is None and data.val is None and cue.data is None:
        raise UserError(
            "probe robustness: nothing to measure; give --data.train and --data.val (degradations) "
            "or --cue.data (shape and texture), or all of them"
        )
    if (data.train is None) != (data.val is None):
        missing = "train" if data.train is None else "val"
        raise UserError(
            f"probe robustness: data.{missing} is missing; probes are fitted on train and score "
            f"val; set --data.{missing}"
        )
    if degradations is not None and data.train is None:
        raise UserError(
            "probe robustness: --degradations without images to degrade; give --data.train and "
            "--data.val"
        )
    if cue.train is not None and cue.data is None:
        raise UserError("probe robustness: --cue.train without --cue.data; give --cue.data")
