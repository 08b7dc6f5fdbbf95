"""Passes of a frozen backbone over the images of one loader, one after the other in one command."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from contramask.distributed import gather
from contramask.models.backbone import Backbone
from contramask.probes.evaluation import CleanData, Split
from contramask.probes.extraction import gather_rows, read
from contramask.probes.features import CLEAN, CLS, Feature
from contramask.types import Batch, UserError, fold

Change = Callable[[Tensor, Sequence[str]], Tensor]


class Read(NamedTuple):
    """Features of images, and what is known of them, in an order of their keys.

    Images of equal keys (of shards whose keys begin anew) stand as the sweep has them.
    """

    x: Float[Tensor, "N F"]
    y: Int[Tensor, "N L"]


class OneLoader(pl.LightningDataModule):
    """The clean images of one split: `trainer.validate(module, datamodule=OneLoader(...))`.

    Args:
        data: a data module.
        split: of it.
        limit: the most images over all ranks; None: all.
    """

    def __init__(self, data: CleanData, split: Split, limit: int | None = None):
        super().__init__()
        self.data, self.limit = data, limit
        self.split: Split = split

    def val_dataloader(self) -> Any:
        return self.data.clean_dataloader(self.split, self.limit)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Batch:
        return self.data.to_device(batch, device)


class Reader(pl.LightningModule):
    """Reads the features of one loader, of images as they are or changed.

    The forward is of the trainer's precision, the change of float32.

    Attributes:
        found: after the run: without unlabelled images, in an order that no rank has a part in.

    Args:
        backbone: loaded; it is not changed.
        feature: which.
        change: (normalised images, keys) -> images of the same size; None: as they are. Draws
            hang on the key, which is the image's own wherever it is packed; images of equal keys
            share them. (Its place would tell them apart, but batches do not hold that of each.)
        known: (batch) -> what is kept beside the features, (B, L); None: the labels.
        columns: L.
        everyone: bring the images of all ranks together; False: keep those of this rank.
    """

    found: Read

    def __init__(
        self,
        backbone: Backbone,
        *,
        feature: Feature = CLS,
        change: Change | None = None,
        known: Callable[[Any], Tensor] | None = None,
        columns: int = 1,
        everyone: bool = True,
    ):
        super().__init__()
        self.backbone, self.feature, self.change = backbone, feature, change
        self.known = known or (lambda batch: batch["label"][:, None])
        self.columns, self.everyone = columns, everyone

    def on_validation_epoch_start(self) -> None:
        # A rank without images brings these.
        x = torch.empty((0, self.feature.width(self.backbone.spec)), device=self.device)
        y = torch.empty((0, self.columns), dtype=torch.long, device=self.device)
        self._parts = [(x, y, y.new_empty((0, 2)))]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if "keys" not in batch:
            raise UserError(
                "probe: the batches have no `keys`, on which draws and the order of "
                "images depend; give the clean loaders of the data module"
            )
        keys, y = batch["keys"], self.known(batch)
        if self.change is not None:
            with torch.autocast(self.device.type, enabled=False):
                changed = self.change(batch["views"][CLEAN][0], keys)
            batch = {**batch, "views": {**batch["views"], CLEAN: changed[None]}}
        (x,), _ = read(self.backbone, batch, [self.feature], autocast=None)
        # Bad samples are left out of a batch, so these are no places; their order is that of the
        # sweep all the same, for a batch is as long as its stretch of the sweep at most.
        places = [[fold(key), batch["position"] + i] for i, key in enumerate(keys)]
        place = torch.tensor(places, device=x.device).reshape(-1, 2)
        labelled = (y[:, 0] >= 0).to(x.device)
        self._parts.append((x[labelled], y.to(x.device)[labelled], place[labelled]))

    def on_validation_epoch_end(self) -> None:
        x, y, place = (torch.cat(part) for part in zip(*self._parts, strict=True))
        del self._parts
        if self.everyone:
            x, y, place = (gather_rows(t, via=self.device) for t in (x, y, place))
        order = place[:, 1].argsort(stable=True)
        order = order[place[order, 0].argsort(stable=True)]
        self.found = Read(x[order], y[order])

    def over(
        self, trainer: pl.Trainer, data: CleanData, split: Split, limit: int | None = None
    ) -> Read:
        """One pass of a trainer over a split."""
        trainer.validate(self, datamodule=OneLoader(data, split, limit), verbose=False)
        return self.found


class _Nothing:
    """A loader without batches, of a length that nobody asks for."""

    def __iter__(self) -> Iterator[Batch]:
        return iter(())


class _Agreement(pl.LightningModule):
    """All ranks learn what the first one has."""

    def __init__(self, flags: list[bool]):
        super().__init__()
        self.flags = flags

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        raise AssertionError("there is no batch")

    def on_validation_epoch_end(self) -> None:
        self.flags = gather(torch.tensor([self.flags], device=self.device))[0].tolist()


def missing(trainer: pl.Trainer, names: Sequence[str], done: Mapping[str, Any]) -> list[str]:
    """The names of parts that the first rank has not done: the same list on every rank."""
    flags = [name in done for name in names]
    if trainer.world_size > 1:
        agreement = _Agreement(flags)
        trainer.validate(agreement, dataloaders=_Nothing(), verbose=False)
        flags = agreement.flags
    return [name for name, flag in zip(names, flags, strict=True) if not flag]
