"""A small run that is probed while it trains: a module, clean data, a logger that listens."""

import logging
import random

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from torch import nn

from contramask import distributed
from contramask.models.ema import EmaCopy
from tests.probes.tiny import SIZE, D, TinyBackbone, TinyData


class Training(pl.LightningModule):
    """Draws from every global random stream, and has batch norm, dropout and a frozen part."""

    def __init__(self, *, teacher: bool = False):
        super().__init__()
        self.backbone = TinyBackbone()
        self.backbone.embed.eval()  # one submodule in another mode than the rest
        self.teacher = EmaCopy(TinyBackbone(seed=5)) if teacher else None
        self.head = nn.Linear(D, 1)
        nn.init.ones_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def training_step(self, batch, batch_idx):
        noise = random.random() + np.random.random() + torch.rand(())  # noqa: NPY002
        x = self.head(self.backbone(batch).patch).mean()
        return x * noise + x**2

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Data(TinyData, pl.LightningDataModule):
    """Clean images whose loaders draw random numbers too, and an endless training stream."""

    def __init__(self, **options):
        pl.LightningDataModule.__init__(self)
        TinyData.__init__(self, **options)
        self.asked = []

    def train_dataloader(self):
        return Stream()

    def clean_dataloader(self, split, limit=None):
        self.asked.append((split, limit))
        self.rank, self.world = distributed.rank(), distributed.world()
        random.random(), np.random.random(), torch.rand(())  # noqa: NPY002
        return super().clean_dataloader(split, limit)


class Stream:
    def __iter__(self):
        while True:
            yield torch.randn(4, 3, *SIZE)


class Told(Logger):
    """Keeps what it is told."""

    name = version = "told"

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def train(*callbacks, module=None, steps=6, data=None, resume=None, **options):
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    module, told = module or Training(), Told()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, callbacks=list(callbacks), logger=told,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        use_distributed_sampler=False, log_every_n_steps=5, gradient_clip_val=0.3,
        **{"devices": 1} | options,
    )  # fmt: skip
    trainer.fit(module, datamodule=data or Data(), ckpt_path=resume, weights_only=True)
    return module, trainer, told
