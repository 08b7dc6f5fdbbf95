"""A pretraining of a few steps on made-up images, for those who watch it."""

import math
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset

from contramask.masks import RandomMasking
from contramask.models.vit import VisionTransformer
from contramask.objectives.mae import MAE
from contramask.objectives.moco import MoCoV3
from contramask.training.pretraining import Pretraining
from contramask.types import Batch

IMAGES, SIZE = 4, (8, 12)  # of a micro-batch; pixels


class Stream(IterableDataset):
    """Micro-batches for ever, each a function of its number; `wait` seconds apart."""

    def __init__(self, start: int, wait: float):
        self.start, self.wait = start, wait

    def __iter__(self) -> Iterator[Batch]:
        number = self.start
        while True:
            time.sleep(self.wait)
            draw = torch.Generator().manual_seed(number)
            x = torch.randn(2, IMAGES, 3, *SIZE, generator=draw)
            label = torch.zeros(IMAGES, dtype=torch.long)
            views = {"global": x, "mild": x[:1] + 1}
            yield Batch(views=views, label=label, position=number * IMAGES)
            number += 1


class Made(pl.LightningDataModule):
    """That stream, with what a data module may know of itself."""

    def __init__(self, wait: float = 0.0):
        super().__init__()
        self.wait = wait
        self.num_train = 64
        self.faults = Counter({"truncated": 2, "no label": 1})
        self.images = SimpleNamespace(mean=(0.25, 0.5, 0.75), std=(0.5, 0.25, 0.125))

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        assert trainer is not None
        start = trainer.global_step * trainer.accumulate_grad_batches
        return DataLoader(Stream(start, self.wait), batch_size=None)


def network() -> Pretraining:
    """A hybrid with everything that is random: masks, drop path, dropout."""
    torch.manual_seed(11)
    sizes = {
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "drop_path_rate": 0.2,
        "proj_drop_rate": 0.1,
    }
    return Pretraining(
        VisionTransformer("vit_tiny_patch16_224", img_size=SIZE, patch_size=4, timm=sizes),
        {
            "contrast": partial(MoCoV3, hidden=12, out=6),
            "reconstruct": partial(MAE, mask="random", view="mild", dim=16, depth=1, heads=2),
        },
        masks={"random": partial(RandomMasking, ratio=0.5)},
        weights={"contrast": 0.25, "reconstruct": 0.75},
    )


def train(
    root: Path,
    *callbacks: pl.Callback,
    steps: int = 6,
    data: Made | None = None,
    module: Pretraining | None = None,
    resume: Path | None = None,
    **given: Any,
) -> pl.Trainer:
    """Train and return the trainer; metrics are logged at every second step."""
    options: dict[str, Any] = {"logger": False, "log_every_n_steps": 2, "limit_val_batches": 0}
    options |= given
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        default_root_dir=root,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=any(isinstance(c, pl.callbacks.ProgressBar) for c in callbacks),
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(
        module or network(), data or Made(), ckpt_path=resume, weights_only=True if resume else None
    )
    return trainer


def state(trainer: pl.Trainer) -> dict[str, torch.Tensor]:
    """All that training has made: weights, teachers, statistics, moments, random streams."""
    module = trainer.lightning_module
    found = {f"module/{k}": v for k, v in module.state_dict().items()}
    moments = trainer.optimizers[0].state_dict()["state"]
    for i, values in moments.items():
        found |= {f"moments/{i}/{k}": torch.as_tensor(v) for k, v in values.items()}
    found["random"] = torch.random.get_rng_state()
    assert all(math.isfinite(float(v.double().sum())) for v in found.values())
    return found
