"""k-NN evaluation of a frozen backbone, under `Trainer.validate`."""

from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch

from contramask.distributed import gather, rank
from contramask.functional.cleaning import Cleaning
from contramask.functional.search import Metric
from contramask.models.backbone import Backbone
from contramask.probes.evaluation import TrainAndVal
from contramask.probes.extraction import gather_rows
from contramask.probes.features import CLS, Feature
from contramask.probes.knn_plan import TablePlan, WeightsWord
from contramask.probes.knn_result import result_of
from contramask.probes.knn_table import Scores, Shard, blocks
from contramask.training.clean_loaders import check_loaders
from contramask.types import Batch


class KNNEvaluation(pl.LightningModule):
    """Accuracy of DINO's k-NN protocol (arXiv:2104.14294) for several k from one search.

    Runs under `Trainer.validate` with two loaders of clean batches, train and val, each giving
    every rank its part of the images. Lightning calls it validation because nothing is trained.
    Each rank keeps its own features of train; see `Scores` for how they are searched. Of equally
    near images the one that came first is nearer, those of the first rank before others: where
    there are such images, another number of ranks may vote otherwise. `KNNSearch` counts rows as
    they are stored, whatever the ranks.

    Attributes:
        result: after the run, `values` (`k20_top1`, ..., fractions, of the first metric and
            cleaning), `table` (all of them), `variance_share`, `notes` and `protocol`, one line.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        ks: tuple[int, ...] = (10, 20, 100, 200),
        temperature: float = 0.07,
        metrics: tuple[Metric, ...] = ("cosine",),
        cleanings: tuple[str, ...] = ("raw",),
        weights: WeightsWord = "auto",
        leave_one_out: bool = False,
        feature: Feature = CLS,
        transform: str = "clean view",
        autocast: bool = False,
        store: torch.device | None = None,
    ):
        """Evaluate `backbone`.

        Args:
            backbone: loaded; it is not changed.
            ks: numbers of neighbours; the official ones are 10, 20, 100, 200. Those beyond the bank
                are skipped and noted; where that is all of them it is a `UserError`.
            temperature: of weighted votes.
            metrics: what is near, see `TablePlan`.
            cleanings: what is done to features before, see `Cleaning`.
            weights: of votes, see `TablePlan`.
            leave_one_out: train is its own val, each image without itself; val is not looked at.
            feature: which.
            transform: what the clean view is, for the protocol, e.g. "resize 256, centre crop 224".
            autocast: bfloat16 forward.
            store: where features are kept; None: on the device of the module.
        """
        super().__init__()
        self.plan = TablePlan(metrics, cleanings, ks, temperature, weights, leave_one_out)
        self.backbone, self.feature = backbone, feature
        for word in cleanings:
            Cleaning.parse(word).check(feature.width(backbone.spec))
        self.transform, self.autocast, self.store = transform, autocast, store
        self.result: dict[str, Any] = {}

    def on_validation_epoch_start(self) -> None:
        check_loaders(self.trainer.val_dataloaders)
        self._rows = TrainAndVal(
            self.backbone, feature=self.feature, autocast=self.autocast, store=self.store
        )

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._rows.add(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        x, y = self._rows.parts[0].local()
        sizes = gather(torch.tensor([len(y)], device=self.device)).tolist()
        labels = gather_rows(y, via=self.device)
        own = torch.arange(len(y), device=self.device) + sum(sizes[: rank()])
        bank = Shard(x, own, labels)
        v, w = (x, y) if self.plan.leave_one_out else self._rows.parts[1].local()
        classes = int(labels.max()) + 1 if self._alone(labels) else self._rows.classes(labels)
        del self._rows
        ks = self.plan.possible(len(labels))
        found: list[Scores] = []
        for word in self.plan.cleanings:
            scores = Scores(
                self.plan, Cleaning.parse(word), bank, ks=ks, classes=classes, device=self.device
            )
            for part in blocks(len(w), self.device):
                left_out = own[part] if self.plan.leave_one_out else None
                scores.add(v[part].to(self.device), w[part].to(self.device), left_out)
            found.append(scores)
        self.result = result_of(
            self.plan,
            [s.finished() for s in found],
            bank=len(labels),
            about=f"{self.feature.about()}, {self.transform}",
        )
        values = self.result["values"]
        self.log_dict({f"knn/{n}": float(v) for n, v in values.items()}, sync_dist=True)

    def _alone(self, labels: torch.Tensor) -> bool:
        """Whether val does not matter."""
        return self.plan.leave_one_out and len(labels) > 0


class Nothing:
    """A loader without a batch.

    A list Lightning would take for many loaders, and of a loader of known length 0 it warns.
    """

    def __iter__(self) -> Iterator[Batch]:
        return iter(())
