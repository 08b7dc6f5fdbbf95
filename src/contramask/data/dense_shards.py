"""The data of dense probes: train and val of a set of shards with masks, each image once."""

import logging
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

from contramask.data.dense import MASK, Dense, DenseExamples
from contramask.data.examples import Examples
from contramask.data.index import classes_of
from contramask.data.index_file import Index
from contramask.data.loader import Loader
from contramask.data.module import ImageShards
from contramask.data.shard_set import ShardSet
from contramask.data.shards import ShardSweep
from contramask.data.streaming import Streaming
from contramask.data.tarball import Damaged, Shard, scan
from contramask.data.views import normalise
from contramask.errors import UserError

log = logging.getLogger(__name__)
Split = Literal["train", "val"]


class DenseShards(ImageShards):
    """Images with masks in WebDataset shards, KEY.jpg with KEY.seg.png.

    Loaders of train and val in this order, for `Trainer.validate`: micro-batches of whole images
    in a fixed order, each image once over all ranks. Shards without an index are read through
    once at the start, so that a subset is the same for every number of ranks and workers.

    Attributes:
        dense: how images are cut; set before the first batch.
        train_images: so many images of train, drawn with `seed`; None: all. A larger subset of the
            same seed holds a smaller one.
        val_images: the same of val.
        patches_per_image: so many labelled patches of each image of train, drawn; None: all.
        pictures: whether images of val come along whole.

    Args:
        train: shards to learn from; the patterns of `ImageShards`.
        val: shards to score.
        batch_size: images of a micro-batch on one rank; their tiles lie in memory together.
        workers: processes a rank that decode; 0: none but the trainer's own.
        seed: of the subsets.
        streaming: how shards are read.
    """

    dense: Dense
    train_images: int | None = None
    val_images: int | None = None
    patches_per_image: int | None = None
    pictures = False

    def __init__(
        self,
        train: str | list[str] | dict[str, float],
        *,
        val: str | list[str] | None = None,
        batch_size: int = 2,
        workers: int = 4,
        seed: int = 0,
        streaming: Streaming | None = None,
    ) -> None:
        super().__init__(
            train,
            val=val,
            batch_size=batch_size,
            workers=workers,
            seed=seed,
            streaming=streaming,
        )

    @cached_property
    def names(self) -> list[str] | None:
        """The names in the `classes.json` beside the shards of train, if there is one."""
        return classes_of(self.train_shards.urls)

    def setup(self, stage: str | None = None) -> None:
        """Finds and checks all shards, so that mistakes are told before the first batch."""
        for split in ("train", "val"):
            log.info("%s: %d of %d images", split, self.wanted(split), self.index(split).samples)

    def val_dataloader(self) -> list[Any]:
        """Train and val, as the evaluations of frozen backbones want them."""
        return [self.dense_dataloader(split) for split in ("train", "val")]

    def dense_dataloader(self, split: Split) -> Loader:
        """Whole images, cut."""
        index = self.index(split)
        mean = self.images.mean
        adapter = DenseExamples(
            self.dense,
            reads=Examples(min_side=self.images.min_side),
            fill=(round(255 * mean[0]), round(255 * mean[1]), round(255 * mean[2])),
            patches=self.patches_per_image if split == "train" else None,
            pictures=self.pictures and split == "val",
        )
        # Where there are few images at all, a hundred bad ones are not few.
        grace = min(self.streaming.grace, self.wanted(split) // 2)
        data = ShardSweep(
            index,
            layout=self._layout(),
            decode=adapter.decode,
            collate=adapter.collate,
            streaming=replace(self.streaming, grace=grace),
            limit=self.wanted(split),
            seed=self.seed,
        )
        return self._loader(lambda: data)

    def finish(self, batch: dict[str, Any]) -> Any:
        """8-bit tiles to normalised ones, on whatever device they are."""
        tiles = normalise(batch["tiles"], self.images.mean, self.images.std)
        return batch | {"tiles": tiles}

    def wanted(self, split: Split) -> int:
        """How many images of a split are to be read, over all ranks. Raises `UserError`."""
        held = self.index(split).samples
        wanted = self.train_images if split == "train" else self.val_images
        if wanted is not None and not 1 <= wanted <= held:
            raise UserError(
                f"segmentation: {split}_images is {wanted}; data.{split} has {held} images; set "
                f"--{split}_images to 1..{held}, or leave it out for all"
            )
        return held if wanted is None else wanted

    def about(self) -> list[str]:
        """All that its batches hang on, beside `dense`, in words to compare."""
        shards = [shard.sha256 for split in ("train", "val") for shard in self.index(split).shards]
        subset = (self.train_images, self.val_images, self.patches_per_image, self.seed)
        return [*shards, repr(subset), repr(self.images), str(self.batch_size)]

    def index(self, split: Split) -> Index:
        """Where each sample of a split is. Raises `UserError` where there is none with a mask."""
        return self._indexes[split]

    @cached_property
    def _indexes(self) -> dict[Split, Index]:
        for split, spec in self.patterns.items():
            names = [spec] if isinstance(spec, str) else list(spec or ())
            if any(name.startswith("pipe:") for name in names):
                raise UserError(
                    f"data.{split}: {names[0]} gives its bytes once and in order, and a subset "
                    "needs single samples; give files or addresses"
                )
        if self.val_shards is None:
            raise UserError("data.val names no shards; give a pattern")
        sets: dict[Split, ShardSet] = {"train": self.train_shards, "val": self.val_shards}
        return {split: _index(split, shards) for split, shards in sets.items()}


def _index(split: Split, shards: ShardSet) -> Index:
    index = shards.index or Index(tuple(_scanned(split, url) for url in shards.urls))
    empty = [shard.url for shard in index.shards if not shard.count]
    if len(empty) == len(index.shards):
        raise UserError(
            f"data.{split}: {', '.join(empty[:3])} holds no sample; shards are tars of KEY.jpg and "
            f"KEY.{MASK} members; correct data.{split}"
        )
    if not any(shard.suffixes.get(MASK) for shard in index.shards):
        held = sorted({suffix for shard in index.shards for suffix in shard.suffixes})
        raise UserError(
            f"data.{split}: no sample has a mask, only {', '.join(held)}; segmentation needs "
            f"KEY.{MASK} beside KEY.jpg; set data.{split} to shards with masks"
        )
    if empty:
        log.warning("data.%s: %d shard(s) hold no sample, first %s", split, len(empty), empty[0])
    return index


def _scanned(split: Split, url: str) -> Shard:
    """One pass over a shard that has no index."""
    try:
        return scan(url)[0]
    except Damaged as error:
        raise UserError(f"data.{split}: {url}: {error}; restore this shard") from None
    except OSError as error:
        raise UserError(f"data.{split}: {url} cannot be read ({error}); restore it") from None
