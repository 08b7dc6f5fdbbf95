"""One model through all analyses, or its portrait from the last time."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from contramask.analysis.geometry import Geometry
from contramask.analysis.pairs import channels
from contramask.analysis.portrait import Portrait
from contramask.analysis.reading import Reading
from contramask.analysis.run import analyse, fitting
from contramask.analysis.suite import Settings, suite
from contramask.checkpoints.sources import Source
from contramask.data.examples import Images
from contramask.data.module import ImageShards
from contramask.models.backbone import Backbone
from contramask.models.digest import digest_of
from contramask.types import Batch, UserError

log = logging.getLogger(__name__)
FORMAT = 1  # of portraits; older ones are made again
TOP_CHANNELS, OVERLAP = "repr/top_channels", "repr/top_channels_overlap"


@dataclass(frozen=True)
class Feed:
    """Which images, and how they reach a model.

    Attributes:
        data: shards.
        images: the most of them.
        batch: images at once.
        workers: processes that decode.
        device: where the model runs.
        autocast: forward in bfloat16.
        fed: sizes and normalisation; None: as each model was trained.
        size: pixels a side, if it shall be another one than `fed` says.
        other: further shards, on which only the channels of high variance are looked up.
    """

    data: str | list[str]
    images: int
    batch: int
    workers: int
    device: torch.device
    autocast: bool
    fed: Images | None
    size: int | None = None
    other: str | list[str] | None = None

    def about(self) -> dict[str, Any]:
        """What the report tells of the images."""
        shards = [self.data] if isinstance(self.data, str) else list(self.data)
        found: dict[str, Any] = {"shards": " and ".join(shards), "images": self.images}
        return found | (asdict(self.fed) if self.fed else {})

    def images_of(self, sheet: dict[str, Any]) -> Images:
        """How a model with this sheet is fed."""
        fed = self.fed or Images(
            size=sheet["size"],
            resize=sheet.get("resize"),
            mean=tuple(sheet["mean"]),
            std=tuple(sheet["std"]),
        )
        return fed if self.size is None else replace(fed, size=self.size, resize=None)

    def batches(
        self, data: str | list[str], images: Images, told: Callable[[int], None]
    ) -> Iterator[Batch]:
        """Clean images on the device; tells how many are done."""
        module = ImageShards(data, batch_size=self.batch, workers=self.workers, images=images)
        done = 0
        for batch in module.clean_dataloader("train", limit=self.images):
            yield module.to_device(batch, self.device)
            done += len(batch["keys"])
            told(done)


def portrait_of(
    source: Source,
    feed: Feed,
    folder: Path,
    names: Sequence[str],
    settings: Settings,
    *,
    told: Callable[[int], None],
) -> Portrait:
    """Analyse a model, unless `folder` holds its portrait with the same weights and settings.

    An analysis that does not fit the model is left out with a note.

    Raises:
        UserError: no model, no images, or none of the analyses fits.
    """
    backbone, about = source.load()
    backbone.requires_grad_(requires_grad=False)
    images = _fed(source, backbone, feed.images_of(about["data"]))
    same = (FORMAT, feed.data, feed.other, feed.images, feed.batch, feed.autocast, images)
    digest = digest_of(backbone, *same, tuple(names), settings)
    if (known := Portrait.load(folder, digest)) is not None:
        return known
    backbone.to(feed.device)
    chosen, notes = fitting(backbone, suite(names, settings), (images.size, images.size))
    batches = feed.batches(feed.data, images, told)
    found = analyse(backbone, batches, chosen, autocast=feed.autocast)
    notes += [f"activations of {layer} are not finite; it has no numbers" for layer in found.broken]
    about = _about(source, backbone, about, images) | {"images": found.images, "sha256": digest}
    if feed.other is not None and TOP_CHANNELS in found.readings:
        found.readings[OVERLAP] = _elsewhere(backbone, feed, images, found.readings[TOP_CHANNELS])
    portrait = Portrait.of(about, found.readings, chosen, images.mean, images.std, notes)
    try:
        portrait.save(folder, digest)
    except (OSError, SafetensorError) as error:
        log.warning("%s cannot be written (%s); the report goes on without it", folder, error)
    return portrait


def _fed(source: Source, backbone: Backbone, images: Images) -> Images:
    """What the model can be fed; images smaller than a patch are bad."""
    patch = backbone.spec.patch
    if images.size % patch:
        raise UserError(
            f"{source.name}: images of {images.size} pixels are no whole number of patches of "
            f"{patch}; set --size to a multiple"
        )
    return replace(images, min_side=max(images.min_side, patch))


def _elsewhere(backbone: Backbone, feed: Feed, images: Images, here: Reading) -> Reading:
    """How many of the channels of high variance are the same on the other shards."""
    assert feed.other is not None
    batches = feed.batches(feed.other, images, lambda done: None)
    there = analyse(backbone, batches, {"": Geometry()}, autocast=feed.autocast).readings
    return channels(here, there[TOP_CHANNELS], OVERLAP)[0]


def _about(
    source: Source, backbone: Backbone, about: dict[str, Any], images: Images
) -> dict[str, Any]:
    spec = backbone.spec
    return {
        "path": source.path.name,
        "backbone": str(backbone.config.get("name", type(backbone).__name__)),
        "step": about["step"],
        "net": about["net"],
        "depth": spec.depth,
        "dim": spec.dim,
        "patch": spec.patch,
        "grid": [images.size // spec.patch] * 2,
        "size": images.size,
        "parameters": sum(p.numel() for p in backbone.parameters()),
    }
