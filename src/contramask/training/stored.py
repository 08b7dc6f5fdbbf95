"""Features of train and val, extracted once under `Trainer.validate` and stored."""

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import pytorch_lightning as pl

from contramask.data.module import ImageShards
from contramask.models.backbone import Backbone
from contramask.models.digest import digest_of
from contramask.probes.evaluation import SPLITS, Split
from contramask.probes.extraction import read
from contramask.probes.features import Feature
from contramask.probes.store import Bank
from contramask.probes.store_files import PassFolder
from contramask.probes.store_shelf import Shelf
from contramask.training.unstored import UnstoredImages, shards_of
from contramask.types import Batch, UserError

# What the numbers of a feature mean. Raise it with every change of `features`, of the clean view or
# of decoding that changes them: then what was stored before is not read any more.
MEANING = 1


def stored_features(
    backbone: Backbone,
    data: ImageShards,
    trainer: pl.Trainer,
    wanted: Sequence[Feature],
    *,
    folder: Path,
    limit: int | None = None,
    transform: str,
    splits: Sequence[Split] = SPLITS,
) -> dict[Split, Bank]:
    """Features of the labelled images of some splits; only what is not stored is extracted.

    A stored feature is reused where backbone (weights and architecture), clean view, shards,
    `limit`, the trainer's precision and what makes features (`MEANING`, timm) are the same. After a
    stop extraction goes on where all ranks were, with any number of ranks; of shards without an
    index a split begins anew. The order of rows is that of the shards, whatever the ranks, workers
    and batches.

    Args:
        backbone: loaded; it is not changed.
        data: train and val.
        trainer: made with `use_distributed_sampler=False`. The forward is of its precision;
            features are float32 all the same.
        wanted: which features.
        folder: where they are kept; every rank must see it.
        limit: the most images of each split.
        transform: what the clean view is, e.g. "resize 256, centre crop 224".
        splits: which; the others may have no shards.

    Raises:
        UserError: a stored file is damaged or of other content, another process writes there, the
            disk is full, a split has no shards.
    """
    shelves = shelves_of(
        backbone,
        data,
        folder=folder,
        limit=limit,
        precision=str(trainer.precision),
        transform=transform,
        ranks=trainer.world_size,
        splits=splits,
    )
    passes: dict[Split, PassFolder] = {}
    for split, shelf in shelves.items():
        if missing := shelf.missing(wanted):
            passes[split] = shelf.new_pass(missing)
    if passes:
        if trainer.limit_val_batches not in (None, 1.0):
            raise UserError(
                f"trainer.limit_val_batches is {trainer.limit_val_batches}; stored features are of "
                "all images of a split, or of --limit of them; set that"
            )
        images = UnstoredImages(data, passes, limit=limit)
        with images:
            trainer.validate(Extraction(backbone, images), datamodule=images, verbose=False)
    return {split: shelf.open(wanted) for split, shelf in shelves.items()}


def shelves_of(
    backbone: Backbone,
    data: ImageShards,
    *,
    folder: Path,
    limit: int | None,
    precision: str,
    transform: str,
    ranks: int = 1,
    splits: Sequence[Split] = SPLITS,
) -> dict[Split, Shelf]:
    """Where the features of the splits are, by all that they hang on; see `stored_features`."""
    about = {
        "meaning": MEANING,
        "timm": version("timm"),
        "backbone": digest_of(backbone),
        "architecture": repr((backbone.spec, sorted(backbone.config.items()))),
        "transform": transform,
        "interpolation": data.clean_view.interpolation,
        "limit": limit,
        "precision": precision,
        "images": asdict(data.images),
        "classes": data.num_classes,
    }
    return {
        split: Shelf(folder, split, about | shards_of(data, split, limit, ranks))
        for split in splits
    }


class Extraction(pl.LightningModule):
    """Writes the features of the loaders' images; Lightning calls it validation.

    The forward is of the trainer's precision.
    """

    def __init__(self, backbone: Backbone, images: UnstoredImages):
        super().__init__()
        self.backbone, self.images = backbone, images

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        splits = list(self.images.writers)
        for split in splits[:dataloader_idx]:
            self.images.writers[split].end()
        writer = self.images.writers[splits[dataloader_idx]]
        x, y = read(self.backbone, batch, writer.features, autocast=None)
        writer.add(batch, x, y)

    def on_validation_epoch_end(self) -> None:
        for writer in self.images.writers.values():
            writer.end()
        self.images.finish()
