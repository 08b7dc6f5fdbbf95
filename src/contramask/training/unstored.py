"""The clean images whose features are not stored yet: which they are, where their sweeps begin."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from contramask.data import storage
from contramask.data.module import ImageShards
from contramask.data.shard_set import ShardSet
from contramask.distributed import rank, total, world
from contramask.probes.evaluation import Split
from contramask.probes.store_buffer import Buffer
from contramask.probes.store_files import PartWriter, PassFolder
from contramask.types import Batch, UserError


def shards_of(data: ImageShards, split: Split, limit: int | None, ranks: int = 1) -> dict[str, Any]:
    """Which images the clean ones of a split are, wherever their shards lie; as JSON can hold it.

    An index has checksums; without one a shard is known by its size and, where it is a local file,
    by the time it was written.
    """
    shards = data.train_shards if split == "train" else data.val_shards
    if shards is None:
        raise UserError(f"data.{split} names no shards; set it to look at its images")
    found: dict[str, Any] = {}
    if shards.index is not None:
        entries = [[s.url, s.bytes, s.count, s.sha256] for s in shards.index.shards]
    else:
        entries = _without_index(shards)
        if limit is not None:  # then each reader takes its share of the first ones
            found["readers"] = ranks * max(1, data.workers)
    if limit is not None:
        found["seed"] = data.seed
    return {"shards": [[Path(url).name, *facts] for url, *facts in entries], **found}


def _without_index(shards: ShardSet) -> list[list[Any]]:
    entries = []
    for url, size in zip(shards.urls, storage.sizes(shards.urls), strict=True):
        if size is None:
            raise UserError(f"{url} is missing; restore it, then go on")
        written = Path(url).stat().st_mtime_ns if storage.is_local(url) else None
        entries.append([url, size, written])
    return entries


class UnstoredImages(pl.LightningDataModule):
    """The clean images whose features are not stored yet; a context that holds the folders' locks.

    Attributes:
        starts: split -> where its sweep begins; splits that are stored are left out.
        writers: split -> what takes in its features.

    Args:
        data: train and val.
        passes: split -> the pass that is wanted.
        limit: the most images of each split.
    """

    def __init__(
        self, data: ImageShards, passes: Mapping[Split, PassFolder], *, limit: int | None = None
    ):
        super().__init__()
        self.data, self.passes, self.limit = data, dict(passes), limit
        self.starts: dict[Split, int] = {}
        self.writers: dict[Split, Buffer] = {}
        self._locks: ExitStack | None = None

    def __enter__(self) -> "UnstoredImages":
        return self

    def __exit__(self, *_: object) -> None:
        if self._locks is not None:
            self._locks.close()

    def setup(self, stage: str | None = None) -> None:
        """Lock the folders and see how far they are, on all ranks alike."""
        self._locks = ExitStack()
        for split, folder in self.passes.items():
            self._lock(self._locks, folder)
            self._plan(split, folder)

    def _lock(self, locks: ExitStack, folder: PassFolder) -> None:
        """The first rank holds it, and all learn whether it does."""
        wrong = UserError(
            f"another process extracts features into {folder.path}"
            f"{', or it cannot be written' if rank() else ''}; wait for it, or set --cache to "
            "another folder"
        )
        free = False
        try:
            free = locks.enter_context(folder.locked(wanted=rank() == 0))
        except UserError as error:
            wrong = error
        if self._together(not free):
            raise wrong

    def _plan(self, split: Split, folder: PassFolder) -> None:
        _, start = folder.parts()
        generation = folder.generation
        self._together(flag=True)  # nobody writes before all have read
        if folder.finished:
            return
        if start is None:  # stopped after the last part
            if rank() == 0:
                folder.finish()
            self._together(flag=True)
            return
        shards = self.data.train_shards if split == "train" else self.data.val_shards
        assert shards is not None
        part = {"rank": rank(), "world": world(), "start": start}
        self.starts[split] = start
        self.writers[split] = Buffer(
            PartWriter(folder, generation=generation, **part),
            folder.features,
            stride=self.data.batch_size * world(),
            first=start + rank() * self.data.batch_size,
            # Without an index places say nothing of what other readers have seen.
            lanes=max(1, self.data.workers) if shards.index is not None else None,
        )

    def _together(self, flag: bool) -> bool:
        """Whether any rank says so; also a barrier."""
        assert self.trainer is not None
        device = self.trainer.strategy.root_device
        return bool(total(torch.tensor(float(flag), device=device)) > 0)

    def val_dataloader(self) -> list[Any]:
        return [self.data.clean_dataloader(s, self.limit, at) for s, at in self.starts.items()]

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Batch:
        return self.data.to_device(batch, device)

    def finish(self) -> None:
        """All ranks are through: write the manifests."""
        self._together(flag=True)
        for split in self.writers:
            if rank() == 0:
                self.passes[split].finish()
        self._together(flag=True)
