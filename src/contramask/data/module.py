"""The data of a run: training views without end, clean images once each."""

import logging
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal, cast

import pytorch_lightning as pl
import torch

from contramask import distributed
from contramask.data.examples import CLEAN, CleanExamples, Examples, Images, TrainExamples
from contramask.data.loader import Loader
from contramask.data.order import Layout
from contramask.data.remembered import check, remember
from contramask.data.sequential import SequentialStream, SequentialSweep
from contramask.data.shard_set import NO_INDEX, ShardSet, classes_in, find_shards
from contramask.data.shards import ShardStream, ShardSweep
from contramask.data.streaming import Streaming
from contramask.data.views import Crops, EvalView, Views
from contramask.errors import UserError
from contramask.types import Batch

log = logging.getLogger(__name__)
Split = Literal["train", "val"]


class ImageShards(pl.LightningDataModule):
    """Images in WebDataset shards.

    The training stream is endless and a function of (seed, position): it begins at the position
    that belongs to the trainer's step, whatever the number of ranks and workers.

    Args:
        train: shards to train on: a pattern (path, address, folder, glob, braces, several joined
            by `::`), a list of patterns, or pattern -> weight.
        views: the views of training, by name.
        val: shards to look at cleanly, each sample once.
        batch_size: images of a micro-batch on one rank.
        workers: processes a rank that decode; 0: none but the trainer's own.
        seed: of the order and of all draws.
        images: sizes, normalisation, labels.
        streaming: how shards are read.
    """

    def __init__(
        self,
        train: str | list[str] | dict[str, float],
        *,
        views: dict[str, Crops] | None = None,
        val: str | list[str] | None = None,
        batch_size: int = 256,
        workers: int = 8,
        seed: int = 0,
        images: Images | None = None,
        streaming: Streaming | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1 or workers < 0:
            raise UserError(
                f"data.batch_size is {batch_size} and data.workers {workers}; a batch has 1 image "
                "or more, workers are 0 (none but the trainer's process) or more"
            )
        self.patterns = {"train": train, "val": val}
        self.groups: Mapping[str, Crops] = views or {}
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        self.images, self.streaming = images or Images(), streaming or Streaming()
        self.unit = self.streaming.unit_of(batch_size)
        self._kept: Loader | None = None
        self.faults: Counter[str] = Counter()  # bad training samples of this rank, by reason

    # ---- what there is ----------------------------------------------------------------------

    @cached_property
    def train_shards(self) -> ShardSet:
        """The shards of training, found and checked on first use."""
        return self._shards("train")

    @cached_property
    def val_shards(self) -> ShardSet | None:
        """The shards of validation, if any are set."""
        return self._shards("val") if self.patterns["val"] else None

    @cached_property
    def num_classes(self) -> int:
        """Labels are 0 .. num_classes - 1; 0 where there are none."""
        if self.images.classes is not None:
            return self.images.classes
        return classes_in([s for s in (self.train_shards, self.val_shards) if s is not None])

    @property
    def num_train(self) -> int | None:
        """Samples to train on, over all sources; None without an index."""
        return self.train_shards.samples

    @property
    def num_val(self) -> int | None:
        """Samples of validation; None without an index, 0 where no shards are set."""
        return 0 if self.val_shards is None else self.val_shards.samples

    def epoch_of(self, position: int) -> float | None:
        """How often the data would have been seen at a position; None without an index."""
        return None if self.num_train is None else position / self.num_train

    def setup(self, stage: str | None = None) -> None:
        """Finds and checks everything, so that mistakes are told before the first step."""
        log.info(
            "training on %s images in %d shards, %d classes; validation on %s",
            self.num_train, len(self.train_shards.urls), self.num_classes, self.num_val,
        )  # fmt: skip
        if (index := self.train_shards.index) is None:
            log.warning(NO_INDEX, self.train_shards.sources[0].name)
        else:
            held = min(self.streaming.streams * self.streaming.block, index.samples)
            log.info("all workers hold up to %.1f GB of images", held * index.mean_bytes / 1e9)

    # ---- loaders ----------------------------------------------------------------------------

    def train_dataloader(self) -> Loader:
        """Micro-batches of this rank for ever, from where training stands when reading begins."""
        return self._loader(self._train_set, faults=self.faults)

    def val_dataloader(self) -> Loader | list[Any]:
        """Clean validation images, each once over all ranks."""
        if self.val_shards is None:
            return []
        data = self._clean_set("val", None)
        self._kept = self._loader(lambda: data, keep=True)
        return self._kept

    def teardown(self, stage: str | None = None) -> None:
        """Called by the trainer at its end: lets the workers of validation go."""
        if self._kept is not None:
            self._kept.close()

    def clean_dataloader(self, split: Split, limit: int | None = None, start: int = 0) -> Loader:
        """Clean images for probes, each once over all ranks; `limit`: of a fixed random subset.

        `start`: without so many first places of the sweep. Pass the batches to `to_device`.
        """
        data = self._clean_set(split, limit, start)
        return self._loader(lambda: data)

    @property
    def position(self) -> int:
        """How many images of the stream all ranks have trained on: where it goes on."""
        if self.trainer is None:
            return 0
        per_step = self.batch_size * self.trainer.accumulate_grad_batches * distributed.world()
        return self.trainer.global_step * per_step

    def state_dict(self) -> dict[str, Any]:
        """Called by the trainer for a checkpoint: which data this is; the step says where."""
        return remember(self.train_shards, world=distributed.world(), workers=self.workers)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called by the trainer on resume. Raises `UserError` for other data."""
        check(state_dict, self.state_dict())

    # ---- batches ----------------------------------------------------------------------------

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> Batch:
        """Called by the trainer when a batch has reached its device."""
        return self.finish(batch)

    def to_device(self, batch: dict[str, Any], device: torch.device | str) -> Batch:
        """Moves a batch of `clean_dataloader` and finishes it there."""
        moved = self.transfer_batch_to_device(batch, torch.device(device), 0)
        return self.finish(moved)

    def finish(self, batch: dict[str, Any]) -> Batch:
        """8-bit crops to normalised views, on whatever device they are."""
        views = batch["views"]
        if "photometric" in batch:
            views = self.views.finish(views, batch["photometric"])
        else:
            views = {CLEAN: self.clean_view.normalise(views[CLEAN])}
        kept = {"label": batch["label"], "position": batch["position"], "keys": batch["keys"]}
        return cast("Batch", {"views": views, **kept})

    @cached_property
    def views(self) -> Views:
        """The training views; colours are changed on the accelerator where there is one."""
        if not self.groups:
            raise UserError("data.views names no views; training needs at least one")
        mean, std = self.images.mean, self.images.std
        return Views(self.groups, on_device=self.accelerated, mean=mean, std=std)

    @cached_property
    def clean_view(self) -> EvalView:
        """The view of evaluation."""
        images = self.images
        return EvalView(images.size, resize=images.resize, mean=images.mean, std=images.std)

    @property
    def accelerated(self) -> bool:
        """Whether batches go to an accelerator."""
        if self.trainer is None:
            return torch.cuda.is_available()
        return self.trainer.strategy.root_device.type != "cpu"

    # ---- parts ------------------------------------------------------------------------------

    def _shards(self, split: Split) -> ShardSet:
        spec = self.patterns[split]
        if not spec:
            raise UserError(f"data.{split} names no shards; give a pattern")
        return find_shards(spec, streaming=self.streaming, where=f"data.{split}")

    def _layout(self, start: int = 0) -> Layout:
        return Layout(self.batch_size, distributed.rank(), distributed.world(), start)

    def _examples(self, shards: ShardSet) -> Examples:
        # With an index it is known which shards have labels; without, the classes say it.
        required = shards.indexes is None and self.num_classes > 0
        classes, side = self.num_classes, self.images.min_side
        return Examples(classes=classes, required=required, min_side=side)

    def _train_set(self) -> Any:  # a data set; torch's own type is one that beartype warns of
        shards, streaming = self.train_shards, self.streaming
        adapter = TrainExamples(self.views, reads=self._examples(shards))
        shared = {"layout": self._layout(self.position), "seed": self.seed, "streaming": streaming,
                  "decode": adapter.decode, "collate": adapter.collate}  # fmt: skip
        if shards.indexes is None:
            return SequentialStream(shards.urls, **shared)
        stream = shards.stream(seed=self.seed, unit=self.unit, streaming=streaming)
        return ShardStream(stream, **shared)

    def _clean_set(self, split: Split, limit: int | None, start: int = 0) -> Any:
        shards = self.train_shards if split == "train" else self.val_shards
        if shards is None:
            raise UserError("data.val names no shards; set it to look at validation images")
        adapter = CleanExamples(self.clean_view, reads=self._examples(shards))
        shared = {"layout": self._layout(start), "seed": self.seed, "streaming": self.streaming,
                  "decode": adapter.decode, "collate": adapter.collate, "limit": limit}  # fmt: skip
        if (index := shards.index) is None:
            return SequentialSweep(shards.urls, **shared)
        return ShardSweep(index, **shared)

    def _loader(self, make: Any, *, keep: bool = False, faults: Any = None) -> Loader:
        return Loader(
            make,
            workers=self.workers,
            streaming=self.streaming,
            pin=self.accelerated and torch.cuda.is_available(),
            keep=keep,
            faults=faults,
        )
