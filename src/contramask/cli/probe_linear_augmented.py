"""`contramask probe linear --preset NAME`: linear probing with augmentation as the authors do it.

A stopped probe goes on where it was when the same command is given again.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from lightning_fabric.utilities.exceptions import MisconfigurationException

from contramask.callbacks.checkpoint import Checkpoints
from contramask.callbacks.preemption import (
    Preemption,
    environment_plugins,
    keep_lightning_off_signals,
)
from contramask.callbacks.progress import Progress
from contramask.checkpoints.files import newest
from contramask.cli.parser import Parser
from contramask.cli.probing import (
    normalised,
    open_model,
    positional,
    probe_parser,
    show_result,
    write_result,
)
from contramask.cli.quiet import settle
from contramask.cli.result_name import result_name
from contramask.data.module import ImageShards
from contramask.probes.features import Feature
from contramask.probes.linear import LinearRecipe
from contramask.probes.presets import PRESETS, LinearPreset, preset_of
from contramask.training.augmented_images import AugmentedImages
from contramask.training.linear_augmented import LinearAugmented
from contramask.types import Batch, UserError

# Set by the protocol; what `recipe.batch` is to the paper, the data and the trainer are to us.
_OURS = ("max_steps", "max_epochs", "min_steps", "min_epochs", "max_time")


def main(argv: Sequence[str]) -> None:
    """Train heads on augmented views, or go on; print the result and write it beside the run."""
    name = preset_in(argv)
    if not name:
        raise UserError(f"linear probe: --preset needs a name; there are {', '.join(PRESETS)}")
    preset = preset_of(name)
    parser = build_parser(preset)
    config = parser.parse_args(positional(argv))
    _check_length(config.trainer.as_dict())
    opened = open_model(config.run, config.images)
    given = [Feature.parse(text) for text in config.features or ()]
    parts = parser.build(config)
    parts.data.images, parts.data.seed = opened.images, parts.recipe.seed
    recipe = replace(parts.recipe, batch=preset.recipe.batch)
    features = tuple(given) or preset.features(opened.backbone.spec)
    several = len(features) * len(recipe.rates) > 1
    images = AugmentedImages(parts.data, train=preset.train, val=preset.val, choose=several)
    module = LinearAugmented(
        opened.backbone,
        recipe=recipe,
        features=features,
        classes=parts.data.num_classes,
        samples=images.samples,
        batch_size=parts.data.batch_size,
        digest=opened.about["backbone"],
        images=repr((asdict(parts.data.images), images.views, images.clean)),
    )
    checkpoints = Checkpoints(every=config.every, keep=0)
    trainer = _trainer(parts.trainer.as_dict(), checkpoints)
    others = {"images": config.images, "precision": trainer.precision}
    out = config.out or opened.folder / f"{name_of(name, module, others)}.json"
    folder = out.parent / f".{out.stem}-{module.settings(trainer)[:12]}"
    checkpoints.folder = folder / "checkpoints"
    _fit(trainer, module, images, folder)
    trainer.test(module, datamodule=images, verbose=False)
    if trainer.is_global_zero:
        result = {"probe": "linear", "preset": name, **opened.about, **module.result}
        result["protocol"] = protocol(name, preset, module, images, trainer.precision)
        write_result(result, out)
        shutil.rmtree(folder, ignore_errors=True)  # the result is there
        show_result(result, out)


class Told(Progress):
    """Also says how far scoring is, which may take minutes."""

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count."""
        self._scored, self._last = 0, time.monotonic()

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count, and now and then tell."""
        self._scored += len(batch["label"]) * trainer.world_size
        if self._enabled and time.monotonic() - self._last >= self.interval:
            self._last = time.monotonic()
            self._say(f"scoring: about {self._scored:,} images read")


def build_parser(preset: LinearPreset) -> Parser:
    """The options; those of the recipe are the preset's unless something else is said."""
    parser = probe_parser("linear", __doc__, data=False)
    parser.add_argument("--preset", type=str, required=True, help=", ".join(PRESETS))
    parser.add_class_arguments(ImageShards, "data", skip={"seed", "views", "images"})
    parser.add_class_arguments(LinearRecipe, "recipe", skip={"batch"})
    parser.add_argument(
        "--features", type=list[str] | None, help="SOURCE/POOL/NORM in place of the preset's"
    )
    parser.add_argument("--every", type=int, default=500, help="updates between two checkpoints")
    own = {f.name: getattr(preset.recipe, f.name) for f in fields(LinearRecipe)}
    parser.set_defaults({f"recipe.{k}": v for k, v in own.items() if k != "batch"})
    return parser


def name_of(name: str, module: LinearAugmented, others: Mapping[str, Any]) -> str:
    """Of the file of the result. `others`: what a number hangs on beside heads and batch."""
    preset = preset_of(name)
    features = preset.features(module.backbone.spec)
    default = {"recipe": preset.recipe, "features": features, "images": None}
    plan = {"recipe": module.recipe, "features": module.features, **others}
    return result_name(f"linear-{name}", plan, {**default, "precision": "32-true"})


def protocol(
    name: str,
    preset: LinearPreset,
    module: LinearAugmented,
    images: AugmentedImages,
    precision: object,
) -> str:
    """All that is needed to redo the number, in one line."""
    recipe, training = module.recipe, module.result["training"]
    batch = training["batch"]
    listed = ", ".join(f"{rate:g}" for rate in recipe.rates)
    chosen = ""
    if module.several:
        chosen = (
            f"of {len(module.features)} features x {len(recipe.rates)} rates, all trained side by "
            f"side, the head that is best on {recipe.holdout:.0%} of train, which none learned "
            "from and val is no part of; "
        )
    changed = [
        f"{f.name} {getattr(recipe, f.name)} (preset: {getattr(preset.recipe, f.name)})"
        for f in fields(LinearRecipe)
        if f.name != "seed" and getattr(recipe, f.name) != getattr(preset.recipe, f.name)
    ]
    if batch != recipe.batch:
        changed.append(f"batch {batch} (preset: {recipe.batch})")
    if module.features != preset.features(module.backbone.spec):
        changed.append(f"features {' '.join(map(str, module.features))}")
    idle = f", {training['idle']} of them without a labelled image" if training["idle"] else ""
    value = module.result["values"]
    return (
        f"linear on augmented views, preset {name} ({preset.source}): {recipe.about()}, "
        f"learning rate {listed} x {batch}/256, {recipe.curve()}, {recipe.epochs} epochs of "
        f"{module.samples} train images in batches of {batch} ({training['steps']} steps{idle}), "
        f"weights start normal with std {recipe.init_std:g}, biases at 0, seed {recipe.seed}; "
        f"{chosen}{Feature.parse(module.result['feature']).about()}, rate {value['rate']:g}; "
        f"backbone in eval mode, precision {precision}; train: {images.views}; val: "
        f"{images.clean}{normalised(images.data.images)}; {value['images']} val images, after "
        f"the last step; changed: {'; '.join(changed) or 'nothing'}; the authors' code differs: "
        f"{'; '.join(preset.differs)}"
    )


def preset_in(argv: Sequence[str]) -> str | None:
    """The preset of a command line or its YAML files, which decides the defaults of other options.

    The last one counts; None where there is none, empty where its name is missing.
    """
    found, words = None, [*argv, ""]
    for word, following in pairwise(words):
        option, equals, value = word.partition("=")
        value = value if equals else following
        if option == "--preset":
            found = value
        elif option in ("-c", "--config"):
            found = _preset_of_file(Path(value), found)
    return found


def _preset_of_file(path: Path, otherwise: str | None) -> str | None:
    """A file that cannot be read is named by the parser."""
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return otherwise
    given = content.get("preset", otherwise) if isinstance(content, dict) else otherwise
    return None if given is None else str(given)


def _check_length(trainer: dict[str, Any]) -> None:
    for key in _OURS:
        if trainer.get(key) not in (None, -1):
            raise UserError(
                f"trainer.{key} is {trainer[key]}; the length of a probe is recipe.epochs; set that"
            )


def _trainer(arguments: dict[str, Any], checkpoints: Checkpoints) -> pl.Trainer:
    settle()
    arguments = {k: v for k, v in arguments.items() if k not in _OURS}
    arguments["callbacks"] = [Told(), checkpoints, Preemption(again="the same command")]
    arguments["plugins"] = [*(arguments["plugins"] or []), *environment_plugins()]
    quiet = {"logger": False, "enable_model_summary": False, "max_epochs": -1}
    try:
        return pl.Trainer(**{**arguments, **quiet})
    except MisconfigurationException as error:
        raise UserError(f"trainer: {error}; correct the options under --trainer") from error


def _fit(
    trainer: pl.Trainer, module: LinearAugmented, images: AugmentedImages, folder: Path
) -> None:
    keep_lightning_off_signals(trainer)
    there = newest(folder / "checkpoints") if folder.is_dir() else None
    trainer.fit(
        module, datamodule=images, ckpt_path=str(there) if there else None, weights_only=True
    )
