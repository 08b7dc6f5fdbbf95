"""Images of a few colours as a stream of noisy views and as clean batches, without any decoding."""

from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch

from contramask.probes.features import CLEAN
from contramask.training.augmented_images import VIEW
from contramask.types import Batch
from tests.probes.tiny import CLASSES, images

SAMPLES, VAL = 70, 23


def label_of(index: int) -> int:
    """Every class equally often, no two neighbours alike."""
    return index * 3 % CLASSES


class Stream:
    """Micro-batches of one rank for ever; a view is a function of its position."""

    def __init__(self, data: "Toys"):
        self.data = data

    def __iter__(self) -> Iterator[Batch]:
        data, trainer = self.data, self.data.trainer
        assert trainer is not None
        world, rank = trainer.world_size, trainer.global_rank
        micro = trainer.global_step * trainer.accumulate_grad_batches + data.late
        while True:
            yield data.views((micro * world + rank) * data.batch)
            micro += 1


class Toys(pl.LightningDataModule):
    """What `AugmentedImages` gives: a stream to fit; clean train and val, or val, to test."""

    def __init__(self, batch: int = 10, *, choose: bool = True, late: int = 0, **labels: Any):
        super().__init__()
        self.batch, self.choose, self.late = batch, choose, late
        self.held_label, self.val_label = labels.get("held"), labels.get("val")
        self.is_held = labels.get("is_held", lambda key: False)

    def label(self, index: int) -> int:
        changed = self.held_label is not None and self.is_held(f"image-{index}")
        return self.held_label if changed else label_of(index)

    def views(self, position: int) -> Batch:
        places = range(position, position + self.batch)
        found = [i % SAMPLES for i in places]
        x = [
            images(torch.tensor([label_of(i)]), seed=p) for i, p in zip(found, places, strict=True)
        ]
        return Batch(
            views={VIEW: torch.cat(x)[None]},
            label=torch.tensor([self.label(i) for i in found]),
            position=position,
            keys=[f"image-{i}" for i in found],
        )

    def clean(self, split: str) -> list[Batch]:
        assert self.trainer is not None
        count, first = (SAMPLES, 0) if split == "train" else (VAL, 10**6)
        labels = torch.tensor([self.label(first + i) for i in range(count)])
        x = images(torch.tensor([label_of(first + i) for i in range(count)]), seed=first + 1)
        if split == "val" and self.val_label is not None:
            labels = torch.full_like(labels, self.val_label)
        keys = [f"image-{first + i}" for i in range(count)]
        parts = range(0, count, 9)
        whole = [
            Batch(views={CLEAN: x[None, i : i + 9]}, label=labels[i : i + 9], position=i,
                  keys=keys[i : i + 9])
            for i in parts
        ]  # fmt: skip
        return whole[self.trainer.global_rank :: self.trainer.world_size]

    def train_dataloader(self) -> Stream:
        return Stream(self)

    def test_dataloader(self) -> list[Any]:
        return [Clean(self, split) for split in (("train", "val") if self.choose else ("val",))]


class Clean:
    """A list of batches would be taken for several loaders."""

    def __init__(self, data: Toys, split: str):
        self.data, self.split = data, split

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.data.clean(self.split))
