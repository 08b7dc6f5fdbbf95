"""The images of a linear probe with augmentation: views to learn from, then clean ones to score."""

from typing import Any

import pytorch_lightning as pl

from contramask.data.crops import Crops
from contramask.data.geometry import Interpolation
from contramask.data.module import ImageShards
from contramask.data.views import EvalView
from contramask.probes.evaluation import SPLITS
from contramask.types import Batch, UserError

VIEW = "train"  # the name of the augmented view


class AugmentedImages(pl.LightningDataModule):
    """Random resized crops of train to fit; clean images of train and val to test.

    The stream of crops is that of `ImageShards`: a function of (seed, position), without end.

    Attributes:
        data: the shards.
        samples: images of train.

    Args:
        data: its views are set here, and the interpolation of its clean view.
        train: interpolation of the crops.
        val: interpolation of the resize of clean images.
        choose: whether heads are chosen on clean images of train, which then come before val.

    Raises:
        UserError: the shards of train have no index or too few labels, or there is no val.
    """

    def __init__(
        self,
        data: ImageShards,
        *,
        train: Interpolation = "bicubic",
        val: Interpolation = "bicubic",
        choose: bool = False,
    ):
        super().__init__()
        images = data.images
        self.data, self.choose = data, choose
        data.groups = {VIEW: Crops(size=images.size, interpolation=train)}
        data.clean_view = EvalView(
            images.size, resize=images.resize, interpolation=val, mean=images.mean, std=images.std
        )
        if data.val_shards is None:
            raise UserError("data.val names no shards; the probe is scored on them; set data.val")
        if data.num_train is None:
            raise UserError(
                "data.train has no index, so the length of an epoch is not known; "
                "`contramask pack index` makes one"
            )
        if data.num_classes < 2:
            raise UserError(
                f"probe: the shards have labels of {data.num_classes} classes; a probe needs at "
                "least two; set data.train to shards with `cls`"
            )
        self.samples = data.num_train

    @property
    def views(self) -> str:
        """How an image becomes a view to learn from, for a protocol."""
        crop = self.data.groups[VIEW]
        low, high = crop.scale
        return (
            f"one random resized crop of {crop.size} (area {low:g} to {high:g}, shape 3/4 to 4/3, "
            f"{crop.interpolation}), mirrored with probability {crop.flip:g}"
        )

    @property
    def clean(self) -> str:
        """How an image is scored, for a protocol."""
        view = self.data.clean_view
        return f"resize {view.shorter} ({view.interpolation}), centre crop {view.size}"

    def setup(self, stage: str) -> None:
        """Called by the trainer: where training stands is asked of it by the data."""
        self.data.trainer = self.trainer
        if stage == "fit":
            self.data.setup(stage)

    def train_dataloader(self) -> Any:
        """Crops of this rank for ever, from where training stands."""
        return self.data.train_dataloader()

    def test_dataloader(self) -> list[Any]:
        """Clean images each once over all ranks: of train if heads are chosen, then of val."""
        return [self.data.clean_dataloader(split) for split in SPLITS[not self.choose :]]

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> Batch:
        """Called by the trainer when a batch has reached its device."""
        return self.data.finish(batch)

    def state_dict(self) -> dict[str, Any]:
        """Called by the trainer for a checkpoint: which data this is."""
        return self.data.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called by the trainer on resume. Raises `UserError` for other data."""
        self.data.load_state_dict(state_dict)

    def teardown(self, stage: str) -> None:
        """Called by the trainer at its end."""
        self.data.teardown(stage)
