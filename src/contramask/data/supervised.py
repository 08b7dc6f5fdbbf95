"""The data of fine-tuning: one augmented view with labels, of all of a training set or a part."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import numpy as np
from jaxtyping import Float
from torch import Tensor

from contramask.data.augmentation import Augment
from contramask.data.augmenting import BatchAugment, RandAugment
from contramask.data.crops import Crops
from contramask.data.examples import Examples, Images, Labelled, TrainExamples
from contramask.data.module import ImageShards
from contramask.data.shard_set import ShardSet
from contramask.data.shards import ShardStream
from contramask.data.storage import is_local
from contramask.data.streaming import Streaming
from contramask.data.subset import Catalogue, Subset, catalogue, choose, missing, restricted
from contramask.data.views import Views
from contramask.errors import UserError
from contramask.types import Batch, fold

log = logging.getLogger(__name__)

TRAIN = "train"  # the name of the view
# Labels are listed to compare train with val up to so many samples, and of local files: each costs
# two small reads, and a network would read whole shards.
LISTED = 200_000


class Supervised(Batch):
    """A batch with the distribution over classes that each image shall get."""

    target: Float[Tensor, "B C"]


class AugmentedExamples(TrainExamples):
    """Decodes a sample into its one view, after RandAugment."""

    def __init__(self, views: Views, *, reads: Examples, change: RandAugment | None) -> None:
        super().__init__(views, reads=reads)
        self.change = change

    def decode(self, members: Mapping[str, bytes], key: int) -> Labelled:
        """One sample. Raises `BadSample` or `BadImage`."""
        example, label = super().decode(members, key)
        if self.change is not None:
            crops = example.crops
            crops[TRAIN] = self.change(crops[TRAIN][0], fold(key, "randaugment"))[None]
        return Labelled(example, label)


class LabelledShards(ImageShards):
    """Labelled images in indexed shards, augmented for fine-tuning; clean ones for validation.

    Training batches have the view `train`, one crop of each image, and `target`. The stream is that
    of `ImageShards`: endless, and a function of (seed, position), with every draw of the
    augmentation.

    Args:
        train: shards to train on, with an index and labels; see `ImageShards`.
        val: shards to score on.
        augment: what is done to training images and labels.
        subset: which training samples are used.
        batch_size: images of a micro-batch on one rank.
        workers: processes a rank that decode; 0: none but the trainer's own.
        seed: of the order and of all draws but the choice of the subset.
        images: sizes, normalisation, labels; training crops have its `size` too.
        streaming: how shards are read.
    """

    def __init__(
        self,
        train: str | list[str] | dict[str, float],
        *,
        val: str | list[str] | None = None,
        augment: Augment | None = None,
        subset: Subset | None = None,
        batch_size: int = 128,
        workers: int = 8,
        seed: int = 0,
        images: Images | None = None,
        streaming: Streaming | None = None,
    ) -> None:
        super().__init__(
            train,
            val=val,
            batch_size=batch_size,
            workers=workers,
            seed=seed,
            images=images,
            streaming=streaming,
        )
        self.augment, self.subset = augment or Augment(), subset or Subset()
        if self.augment.mixes and batch_size % 2:
            raise UserError(
                f"data.batch_size is {batch_size}, but mixup and cutmix pair the images of a "
                "micro-batch; set it to an even number, or data.augment.mix to 0"
            )

    # ---- what there is ----------------------------------------------------------------------

    @cached_property
    def train_shards(self) -> ShardSet:
        """The shards of training, restricted to the subset."""
        found = self._shards("train")
        if found.indexes is None:
            raise UserError(
                f"data.train: {found.sources[0].name} has no index; fine-tuning counts epochs, so "
                "run `contramask pack index` on it"
            )
        if self.subset.whole:
            return found
        chosen = choose(self.subset, self._train_listed)
        parts = np.split(chosen, np.cumsum([index.samples for index in found.indexes])[:-1])
        for source, mine in zip(found.sources, parts, strict=True):
            if not mine.any():
                raise UserError(f"data.train: the subset has no sample of {source.name}")
        log.info("%s: %d of %d", self.subset.about(), chosen.sum(), len(chosen))
        indexes = zip(found.indexes, parts, strict=True)
        return replace(found, indexes=tuple(restricted(index, mine) for index, mine in indexes))

    @cached_property
    def _train_listed(self) -> Catalogue:
        index = self._shards("train").index
        assert index is not None
        return catalogue(index)

    def setup(self, stage: str | None = None) -> None:
        """Finds and checks everything, so that mistakes are told before the first step."""
        super().setup(stage)
        if self.num_classes == 0:
            raise UserError(
                "data.train has no labels; fine-tuning needs a member `cls` in every sample"
            )
        _ = self.views, self.change  # a crop or a RandAugment that cannot be is told now
        self._compare_labels()

    def _compare_labels(self) -> None:
        index = None if self.val_shards is None else self.val_shards.index
        urls = self.train_shards.urls + ([] if index is None else [s.url for s in index.shards])
        many = (self.num_train or 0) + (self.num_val or 0) > LISTED and self.subset.whole
        if index is None or many or not all(map(is_local, urls)):
            log.info("whether training has all classes of validation is not checked")
            return
        if lacking := missing(self._train_listed.labels, catalogue(index).labels):
            raise UserError(
                f"data.val has images of {lacking}, data.train has none; use shards of the same "
                "classes, or check the labels"
            )

    def state_dict(self) -> dict[str, Any]:
        """Called by the trainer for a checkpoint: which data, and which part of it."""
        index = self.train_shards.index
        assert index is not None
        starts = [shard.starts for shard in index.shards]
        part = hashlib.sha256(np.concatenate(starts).tobytes()).hexdigest()[:16]
        return super().state_dict() | {"part": part}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called by the trainer on resume. Raises `UserError` for other data."""
        super().load_state_dict(state_dict)
        if state_dict["part"] != self.state_dict()["part"]:
            raise UserError(
                f"the checkpoint was trained on another part of data.train than "
                f"{self.subset.about()}; set the subset back, or start another run"
            )

    # ---- batches ----------------------------------------------------------------------------

    def finish(self, batch: dict[str, Any]) -> Batch:
        """Normalised views; of a training batch erased and mixed, with its targets."""
        found = super().finish(batch)
        if TRAIN not in found["views"]:
            return found
        images, target = self.regularise(
            found["views"][TRAIN][0], found["label"], found["position"]
        )
        return cast("Supervised", {**found, "views": {TRAIN: images[None]}, "target": target})

    @cached_property
    def regularise(self) -> BatchAugment:
        """What is done to a whole batch on its device."""
        return BatchAugment(self.augment, self.num_classes, seed=self.seed)

    @cached_property
    def views(self) -> Views:
        """The one view of training."""
        augment, images = self.augment, self.images
        crop = Crops(
            size=images.size,
            scale=augment.scale,
            ratio=augment.ratio,
            interpolation=augment.interpolation,
            flip=augment.flip,
            photometric=(augment.photometric,) if augment.photometric else (),
        )
        return Views({TRAIN: crop}, on_device=self.accelerated, mean=images.mean, std=images.std)

    @cached_property
    def change(self) -> RandAugment | None:
        """What workers do to a crop, if anything."""
        augment, images = self.augment, self.images
        if not augment.randaugment:
            return None
        return RandAugment(
            augment.randaugment,
            size=images.size,
            mean=images.mean,
            interpolation=augment.interpolation,
        )

    def _examples(self, shards: ShardSet) -> Examples:
        return Examples(classes=self.num_classes, required=True, min_side=self.images.min_side)

    def _train_set(self) -> Any:  # a data set; torch's own type is one that beartype warns of
        shards, streaming, reads = (
            self.train_shards,
            self.streaming,
            self._examples(self.train_shards),
        )
        adapter = AugmentedExamples(self.views, reads=reads, change=self.change)
        stream = shards.stream(seed=self.seed, unit=self.unit, streaming=streaming)
        return ShardStream(
            stream,
            layout=self._layout(self.position),
            decode=adapter.decode,
            collate=adapter.collate,
            seed=self.seed,
            streaming=streaming,
        )
