"""Probes while training goes on: clean features of the weights as they are, scored now and then."""

import logging
import random
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch

from contramask.callbacks.cadence import Cadence
from contramask.callbacks.telling import tell
from contramask.distributed import mean
from contramask.models.backbone import Backbone
from contramask.probes.evaluation import SPLITS, CleanData, TrainAndVal
from contramask.probes.features import CLS, Feature, frozen
from contramask.probes.knn import KNN
from contramask.probes.linear import LinearProbe, LinearRecipe
from contramask.types import UserError

log = logging.getLogger(__name__)

# Enough to rank runs and to see a collapse; the offline probe is the one to report.
ONLINE = LinearRecipe(rates=(0.01, 0.03, 0.1, 0.3, 1.0), epochs=30, batch=256)


class OnlineProbes(pl.Callback):
    """Every so many steps: k-NN and a linear probe on features of clean images.

    Stateless: what it logs is a function of the weights and the data, so a resumed run goes on as
    if it had not stopped. Training is left bitwise as it is: the forward is in eval mode and
    without gradient, each submodule gets its own mode back, and so do the random streams.

    Logs `val/knn{k}_top1`, `val/linear_top1` (fractions) and `online/seconds`, to the loggers at
    the step they belong to and to `trainer.callback_metrics`, where they can be monitored.

    Memory: 4 F bytes for each image of bank and val, freed afterwards.
    """

    def __init__(
        self,
        *,
        every: int = 1000,
        bank: int = 10000,
        val: int = 5000,
        ks: tuple[int, ...] = (1, 20),
        linear: LinearRecipe = ONLINE,
        feature: Feature = CLS,
        net: Literal["student", "teacher"] = "student",
        autocast: bool = False,
    ):
        """Probe.

        Args:
            every: weight updates between two probes. The last update of `max_steps` is probed too;
                a run that is stopped before is not, since its continuation will be.
            bank: training images, over all ranks.
            val: validation images, over all ranks.
            ks: neighbours that vote.
            linear: how the linear probe is trained, from scratch each time.
            feature: which.
            net: whose weights.
            autocast: bfloat16 forward.
        """
        if every < 1:
            raise UserError(f"online probes: every is {every}; allowed is at least 1; set every")
        self.every, self.limits = every, (bank, val)
        self.ks, self.linear = ks, linear
        self.feature = feature
        self.net, self.autocast = net, autocast
        self._cadence, self._off = Cadence(every), False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        network(pl_module, self.net)  # a misspelt wish is told before the first step
        try:
            with undisturbed(pl_module.device):
                clean_data(trainer).clean_dataloader("val", limit=1)
        except UserError as error:
            log.warning("online probes are off: %s", error)
            self._off = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._cadence.start(trainer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not self._cadence.due(trainer) or self._off:
            return
        start = time.perf_counter()
        with undisturbed(pl_module.device):
            rows = self._read(trainer, network(pl_module, self.net))
            try:
                values = self._score(rows)
            except UserError as error:  # of what all ranks know together: on all or on none
                log.warning("online probes are off: %s", error)
                self._off = True
                return
        self._tell(trainer, pl_module, {**values, "online/seconds": time.perf_counter() - start})

    def _read(self, trainer: pl.Trainer, backbone: Backbone) -> TrainAndVal:
        """Features of both splits."""
        rows = TrainAndVal(backbone, feature=self.feature, autocast=self.autocast)
        data = clean_data(trainer)
        with frozen(backbone):
            for index, (split, limit) in enumerate(zip(SPLITS, self.limits, strict=True)):
                for batch in data.clean_dataloader(split, limit=limit):
                    rows.add(data.to_device(batch, rows.device), index)
        return rows

    def _score(self, rows: TrainAndVal) -> dict[str, float]:
        """Fit each probe and count its hits."""
        x, y = rows.train()
        classes = rows.classes(y)
        ks = tuple(k for k in self.ks if k <= len(y))
        for k in set(self.ks) - set(ks):
            log.warning("online k-NN: no k = %d, the bank has %d labelled images", k, len(y))
        knn, linear = KNN(classes, ks=ks), LinearProbe(x.shape[1], classes, recipe=self.linear)
        knn.fit(x, y)
        linear.to(x.device).fit(x, y)

        def predict(x: torch.Tensor) -> dict[str, torch.Tensor]:
            votes = {f"knn{k}": scores for k, scores in knn.votes(x).items()}
            return {**votes, "linear": linear.predict(x)}

        found = rows.accuracies(predict, classes)
        return {f"val/{name}": v for name, v in found.items() if name.endswith("_top1")}

    def _tell(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, values: dict[str, float]
    ) -> None:
        # Ranks agree to the last digit, as a monitored value must.
        agreed = mean(torch.tensor(list(values.values()), device=pl_module.device)).tolist()
        values = dict(zip(values, agreed, strict=True))
        tell(trainer, pl_module, values)


@contextmanager
def undisturbed(device: torch.device) -> Generator[None]:
    """The random streams of Python, NumPy, torch and this rank's GPU go on as if nothing was."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  the global one is meant
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def clean_data(trainer: pl.Trainer) -> CleanData:
    data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(data, CleanData):
        raise UserError(
            f"the data module is {type(data).__name__}; needed is one with clean_dataloader and "
            "to_device, such as ImageShards; set data"
        )
    return data


def network(pl_module: pl.LightningModule, net: str) -> Backbone:
    """The student's or the teacher's backbone, the module itself, not its compiled forward."""
    path = {"student": "backbone", "teacher": "teacher.module"}[net]
    try:
        backbone = pl_module.get_submodule(path)
    except AttributeError:
        raise UserError(
            f"online probes: net is {net!r}, but this run has none; allowed is student; set net"
        ) from None
    assert isinstance(backbone, Backbone)
    return backbone
