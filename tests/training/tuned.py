"""A small fine-tuning on images from memory, on one rank or several."""

from typing import Any

import pytorch_lightning as pl
import torch

from contramask.callbacks.validation import Validation
from contramask.data.augmentation import Augment
from contramask.data.augmenting import BatchAugment
from contramask.optim import Optim
from contramask.schedule import Schedule
from contramask.training.finetuning import UNDECAYED, FineTuning
from contramask.types import Batch
from tests.builders import exact, tiny_vit

SIDE, CLASSES = 16, 7
PLAIN = Augment(randaugment=None, erasing=0.0, mix=0.0, smoothing=0.1)
OPTIM = Optim(
    lr=Schedule(peak=1e-3, end=1e-5, warmup=0.25), batch=None, betas=(0.9, 0.999), layer_decay=0.5,
    rules=UNDECAYED, clip=1.0,
)  # fmt: skip


def labels(position: int, count: int) -> torch.Tensor:
    return torch.tensor([(3 * (position + i)) % CLASSES for i in range(count)])


def pictures(position: int, count: int) -> torch.Tensor:
    """Every image is a function of its own place, with the colour of its label."""
    colour = labels(position, count)[:, None, None, None] / CLASSES
    noise = torch.stack([exact(3, SIDE, SIDE, seed=position + i) for i in range(count)])
    return colour + noise


class Memory(pl.LightningDataModule):
    """An endless stream by position, and clean images, of which each rank has its part."""

    faults = None

    def __init__(self, batch: int = 4, augment: Augment = PLAIN):
        super().__init__()
        self.batch = batch
        self.finish = BatchAugment(augment, CLASSES, seed=0)

    def train_dataloader(self):
        t = self.trainer
        micro = t.global_step * t.accumulate_grad_batches
        while True:
            start = (micro * t.world_size + t.global_rank) * self.batch
            yield {"position": start}
            micro += 1

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        position = batch["position"]
        known = labels(position, self.batch)
        images, target = self.finish(pictures(position, self.batch), known, position)
        found = {"views": {"train": images[None]}, "label": known, "position": position}
        return {**found, "target": target}

    def clean_dataloader(self, split: str, limit: int | None = None):
        starts = range(1000, 1000 + 25, 5)[self.trainer.global_rank :: self.trainer.world_size]
        return [
            {"views": {"clean": pictures(s, 5)[None]}, "label": labels(s, 5), "position": s}
            for s in starts
        ]

    def to_device(self, batch: Batch, device: Any) -> Batch:
        return batch


def model(**changes: Any) -> FineTuning:
    settings = {"size": SIDE, "drop_path": 0.0, "head_std": 0.02, "optim": OPTIM}
    return FineTuning(tiny_vit(img_size=SIDE), CLASSES, **settings | changes)


def tune(
    module: FineTuning, *, steps: int = 4, data: Memory | None = None, ckpt: Any = None,
    **options: Any,
) -> pl.Trainer:  # fmt: skip
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "limit_val_batches": 0}
    trainer = pl.Trainer(max_steps=steps, **quiet | options)
    trainer.fit(module, datamodule=data or Memory(), ckpt_path=ckpt)
    return trainer


def trained(batch: int, **options: Any) -> dict[str, Any]:
    """Weights, average and scores after four updates of two micro-batches each."""
    module, validation = model(ema=0.7), Validation(2)
    erased = Memory(batch, Augment(randaugment=None, erasing=0.5, mix=0.0))
    tune(module, data=erased, callbacks=[validation], accumulate_grad_batches=2, **options)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    return {"state": state, "values": validation.values}
