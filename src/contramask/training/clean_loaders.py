"""The loaders that evaluations of frozen backbones run over."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, DistributedSampler

from contramask.distributed import world
from contramask.probes.evaluation import SPLITS, CleanData
from contramask.types import Batch, UserError


class CleanImages(pl.LightningDataModule):
    """The clean images of a data module, train and val, as the evaluations want them.

    `Trainer(use_distributed_sampler=False).validate(evaluation, datamodule=CleanImages(data))`.

    Args:
        data: the data module of pretraining, or one like it.
        limit: the most images of train and of val, over all ranks; None: all.
    """

    def __init__(self, data: CleanData, *, limit: int | None = None):
        super().__init__()
        self.data, self.limit = data, limit

    def val_dataloader(self) -> list[Any]:
        return [self.data.clean_dataloader(split, self.limit) for split in SPLITS]

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Batch:
        return self.data.to_device(batch, device)


def check_loaders(loaders: object) -> None:
    """Two loaders, train and val, of which each image comes once over all ranks.

    Raises:
        UserError: for another number of loaders, or for a sampler that repeats images.
    """
    if not isinstance(loaders, list | tuple) or len(loaders) != 2:
        count = len(loaders) if isinstance(loaders, list | tuple) else 1
        raise UserError(
            f"probe: {count} loader(s) given; allowed are two, [train, val], both with the eval "
            "transform; call trainer.validate(module, datamodule=CleanImages(data))"
        )
    for name, loader in zip(("train", "val"), loaders, strict=True):
        sampler = loader.sampler if isinstance(loader, DataLoader) else None
        if isinstance(sampler, DistributedSampler) and sampler.total_size != len(sampler.dataset):  # pyright: ignore[reportArgumentType]
            raise UserError(
                f"probe: the sampler of {name} repeats images so that {world()} ranks get equally "
                "many, and they would be counted twice; give each rank its own part and set "
                "Trainer(use_distributed_sampler=False)"
            )
