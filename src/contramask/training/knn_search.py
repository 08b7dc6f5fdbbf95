"""k-NN of stored features, under `Trainer.validate`: a table of metric by cleaning by k."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from contramask.distributed import rank, world
from contramask.functional.cleaning import Cleaning
from contramask.probes.features import Feature
from contramask.probes.knn_plan import TablePlan
from contramask.probes.knn_result import result_of
from contramask.probes.knn_table import Scores, Shard, blocks
from contramask.probes.parts import Parts
from contramask.probes.store import Bank, StoredFeatures
from contramask.training.knn import Nothing
from contramask.types import UserError


class KNNSearch(pl.LightningModule):
    """Searches a bank of stored features for each cleaning in turn; Lightning calls it validation.

    `trainer.validate(KNNSearch(...))` needs no loaders: the module brings its own, one for each
    cleaning that is not finished, of blocks of queries. Each rank holds one part of the bank and
    brings one part of the queries; rows are counted as they are stored, so that numbers do not
    depend on the ranks.

    Args:
        train: the bank.
        val: the queries; None: the bank itself, with `plan.leave_one_out`.
        feature: which of the stored ones.
        plan: which numbers.
        parts: makes the record of finished cleanings; called on rank 0 alone. None: no record.
        store: where this rank's part of the bank lies; None: on the device of the module. Parts of
            32,768 rows are moved to the device in turn.

    Raises:
        UserError: for a cleaning or ks that the bank does not allow.
    """

    def __init__(
        self,
        train: Bank,
        val: Bank | None,
        feature: Feature,
        plan: TablePlan,
        *,
        parts: Callable[[], Parts] | None = None,
        store: torch.device | None = None,
    ):
        super().__init__()
        assert (val is None) == plan.leave_one_out, "queries are val, or the bank itself"
        banks = {"train": train, "val": train if val is None else val}
        self.classes = 1 + max(int(b.y.max()) if len(b) else 0 for b in banks.values())
        for split, bank in banks.items():
            bank.check(split, self.classes)
        self.train_bank, self.queries = banks["train"], banks["val"]
        self.feature, self.plan = feature, plan
        self.ks = plan.possible(len(train))
        for word in plan.cleanings:
            Cleaning.parse(word).check(train.x[feature].shape[1])
        self.finished: dict[str, dict[str, Any]] = {}
        self._make_parts, self._store = parts, store
        self._parts: Parts | None = None
        self._scores: Scores | None = None
        self._at = -1

    def setup(self, stage: str) -> None:
        """See what is finished, on all ranks alike, and take this rank's part of the bank."""
        limit = self.trainer.limit_val_batches
        if limit is not None and (isinstance(limit, int) or limit < 1):  # the number 1: one batch
            raise UserError(
                f"trainer.limit_val_batches is {limit}; k-NN counts all "
                "queries; remove it, or set --limit for fewer images"
            )
        if self.trainer.is_global_zero and self._make_parts is not None:
            self._parts = self._make_parts()
        done = {} if self._parts is None else self._parts.done
        self.finished = dict(self.trainer.strategy.broadcast(done))
        self.pending = [word for word in self.plan.cleanings if word not in self.finished]
        numbers = _own(len(self.train_bank))
        rows = _rows(self.train_bank, self.feature, numbers)
        self._shard = Shard(rows, numbers, self.train_bank.y)

    def on_validation_start(self) -> None:
        # Only now is the module where it is to work.
        rows = self._shard.rows.to(self._store or self.device)
        self._shard = replace(self._shard, rows=rows)

    def val_dataloader(self) -> list["Blocks | Nothing"]:
        if not self.pending:
            return [Nothing()]
        numbers = _own(len(self.queries))
        alone = self.plan.leave_one_out
        x = self._shard.rows if alone else _rows(self.queries, self.feature, numbers)
        queries = {"x": x, "y": self.queries.y[numbers]} | ({"own": numbers} if alone else {})
        return [Blocks(queries, self.trainer.strategy.root_device) for _ in self.pending]

    def validation_step(
        self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if dataloader_idx != self._at:
            self._close()
            cleaning = Cleaning.parse(self.pending[dataloader_idx])
            self._scores = Scores(
                self.plan,
                cleaning,
                self._shard,
                ks=self.ks,
                classes=self.classes,
                device=self.device,
            )
            self._at = dataloader_idx
        assert self._scores is not None
        self._scores.add(batch["x"], batch["y"], batch.get("own"))

    def on_validation_epoch_end(self) -> None:
        self._close()
        del self._shard

    def result(self, about: str) -> dict[str, Any]:
        """What `result_of` says, after the run. `about`: feature and transform."""
        if not self.finished and self._make_parts is not None:  # the ranks were processes apart
            self.finished = dict(self._make_parts().done)
        finished = [self.finished[word] for word in self.plan.cleanings]
        return result_of(self.plan, finished, bank=len(self.train_bank), about=about)

    def _close(self) -> None:
        """The cleaning that was searched last is finished."""
        if self._scores is None:
            return
        word, found = self.pending[self._at], self._scores.finished()
        self.finished[word], self._scores = found, None
        if self._parts is not None:
            self._parts.add(word, found)


class Blocks:
    """Blocks of this rank's queries, equally many on every rank."""

    def __init__(self, queries: Mapping[str, Tensor], device: torch.device):
        self.queries = queries
        self.slices = blocks(len(queries["x"]), device)

    def __len__(self) -> int:
        return len(self.slices)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for part in self.slices:
            yield {name: rows[part] for name, rows in self.queries.items()}


def _own(rows: int) -> Tensor:
    """The numbers of this rank's rows: one stretch of them."""
    first, end = (rows * i // world() for i in (rank(), rank() + 1))
    return torch.arange(first, end)


def _rows(bank: Bank, feature: Feature, numbers: Tensor) -> Tensor:
    """These rows and no others from the disk; all of them mapped where that is possible."""
    if isinstance(bank.x, StoredFeatures) and len(numbers) < len(bank):
        return bank.x.rows(feature)[numbers]
    x = bank.x[feature]
    return x if len(numbers) == len(x) else x[numbers]
