"""Linear evaluation of a frozen backbone, under `Trainer.validate`."""

from typing import Any

import pytorch_lightning as pl
import torch

from contramask.models.backbone import Backbone
from contramask.probes.evaluation import TrainAndVal
from contramask.probes.features import CLS, Feature
from contramask.probes.linear import LinearProbe, LinearRecipe
from contramask.training.clean_loaders import check_loaders
from contramask.types import Batch

OFFLINE = LinearRecipe()


class LinearEvaluation(pl.LightningModule):
    """Accuracy of a linear probe on features that are computed once.

    Runs under `Trainer.validate` with two loaders of clean batches, train and val, each giving
    every rank its part of the images. The features of train are brought together, and every rank
    trains the same heads on all of them: seconds beside the forward passes, and the number does not
    depend on a split of batches over ranks.

    Attributes:
        probe: the trained probe, after the run.
        result: after the run, `values` (`top1`, `top5`: fractions; `rate`, the learning rate),
            `sweep` (rate: accuracy on the rows of train held out to choose it) and `protocol`.
    """

    probe: LinearProbe

    def __init__(
        self,
        backbone: Backbone,
        *,
        recipe: LinearRecipe = OFFLINE,
        feature: Feature = CLS,
        transform: str = "clean view",
        autocast: bool = False,
        store: torch.device | None = None,
    ):
        """Evaluate `backbone`.

        Args:
            backbone: loaded; it is not changed.
            recipe: how the heads are trained.
            feature: which.
            transform: what the clean view is, for the protocol, e.g. "resize 256, centre crop 224".
            autocast: bfloat16 forward.
            store: where features are kept; None: on the device of the module.
        """
        super().__init__()
        self.backbone, self.recipe = backbone, recipe
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
        probe = LinearProbe(x.shape[1], classes, recipe=self.recipe).to(self.device)
        probe.fit(x, y)
        found = self._rows.accuracies(lambda x: {"linear": probe.predict(x)}, classes)
        del self._rows
        values = {name.removeprefix("linear_"): value for name, value in found.items()}
        values["rate"] = probe.rates[0]
        self.probe = probe
        self.result = {
            "values": values,
            "sweep": probe.sweep,
            "protocol": f"{probe.protocol}; {self.feature.about()}, no "
            f"augmentation, {self.transform}; {values['images']} val images",
        }
        self.log_dict({f"linear/{n}": float(v) for n, v in values.items()}, sync_dist=True)
