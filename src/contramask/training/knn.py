"""k-NN evaluation of a frozen backbone, under `Trainer.validate`."""

from typing import Any

import pytorch_lightning as pl
import torch

from contramask.models.backbone import Backbone
from contramask.probes.evaluation import TrainAndVal
from contramask.probes.features import CLS, Feature
from contramask.probes.knn import KNN
from contramask.training.clean_loaders import check_loaders
from contramask.types import Batch


class KNNEvaluation(pl.LightningModule):
    """Accuracy of DINO's k-NN protocol (arXiv:2104.14294) for several k from one search.

    Runs under `Trainer.validate` with two loaders of clean batches, train and val, each giving
    every rank its part of the images. Lightning calls it validation because nothing is trained.

    Attributes:
        result: after the run, `values` (`k20_top1`, ..., fractions) and `protocol`, one line.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        ks: tuple[int, ...] = (10, 20, 100, 200),
        temperature: float = 0.07,
        feature: Feature = CLS,
        transform: str = "clean view",
        autocast: bool = False,
        store: torch.device | None = None,
    ):
        """Evaluate `backbone`.

        Args:
            backbone: loaded; it is not changed.
            ks: numbers of neighbours; the official ones are 10, 20, 100, 200.
            temperature: of the votes.
            feature: which.
            transform: what the clean view is, for the protocol, e.g. "resize 256, centre crop 224".
            autocast: bfloat16 forward.
            store: where features are kept; None: on the device of the module.
        """
        super().__init__()
        self.backbone, self.ks, self.temperature = backbone, ks, temperature
        self.feature = feature
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
        x, y = self._rows.train()
        classes = self._rows.classes(y)
        probe = KNN(classes, ks=self.ks, temperature=self.temperature)
        probe.fit(x, y)
        values = self._rows.accuracies(
            lambda x: {f"k{k}": votes for k, votes in probe.votes(x).items()}, classes
        )
        del self._rows
        # Fewer than five neighbours cannot name five classes.
        values = {n: v for n, v in values.items() if n not in {f"k{k}_top5" for k in range(1, 5)}}
        self.result = {
            "values": values,
            "protocol": f"{probe.protocol}; {self.feature.about()}, {self.transform}; "
            f"{values['images']} val images",
        }
        self.log_dict({f"knn/{n}": float(v) for n, v in values.items()}, sync_dist=True)
