"""Accuracy of probes from clean batches of train and val; for every caller the same."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from contramask.distributed import gather
from contramask.models.backbone import Backbone
from contramask.probes.extraction import Rows, gather_rows, read
from contramask.probes.features import CLS, Feature
from contramask.probes.probe import accuracy
from contramask.types import Batch, UserError

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")


@runtime_checkable
class CleanData(Protocol):
    """What a data module offers to probes."""

    def clean_dataloader(self, split: Split, limit: int | None = None) -> Iterable[Any]:
        """Batches with the one view `clean`, one crop of each image.

        `limit` counts images over all ranks: always the same ones. Each rank gets its part, and no
        image comes twice. Raises `UserError` where the split has no data.
        """
        ...

    def to_device(self, batch: Any, device: torch.device | str) -> Batch:
        """The batch, normalised, on that device."""
        ...


# Images scored at once; bounds the memory of votes and logits.
SCORED = 1024


class TrainAndVal:
    """Features of train (0) and val (1), read batch by batch from a backbone in eval mode.

    With several ranks each brings its part of both. Nothing is exchanged before `train` and
    `accuracies`, which every rank calls, so parts may be of any length.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        feature: Feature = CLS,
        autocast: bool = False,
        store: torch.device | None = None,
    ):
        self.backbone, self.autocast = backbone, autocast
        self.feature = feature
        self.device = next(backbone.parameters()).device
        self.parts = [Rows(feature.width(backbone.spec), store or self.device) for _ in range(2)]

    def add(self, batch: Batch, loader: int) -> None:
        """The features of one batch of train (0) or val (1)."""
        (x,), y = read(self.backbone, batch, [self.feature], autocast=self.autocast)
        self.parts[loader].add(x, y)

    def train(self) -> tuple[Tensor, Tensor]:
        """Features and labels of train, of all ranks."""
        x, y = (gather_rows(part, via=self.device) for part in self.parts[0].local())
        self.parts[0].parts.clear()
        return x, y

    def classes(self, train: Tensor) -> int:
        """The number of classes, from the labels of train and val of all ranks.

        Raises:
            UserError: if one of them has no labelled image.
        """
        val = self.parts[1].local()[1]
        largest = torch.stack([y.max() if len(y) else y.new_tensor(-1) for y in (train, val)])
        largest = gather(largest[None].to(self.device)).amax(0).tolist()
        for name, label in zip(("train", "val"), largest, strict=True):
            if label < 0:
                raise UserError(
                    f"probe: no image of {name} has a label; a probe needs `cls` in its shards; "
                    f"set data.{name} to labelled shards"
                )
        return int(max(largest)) + 1

    def accuracies(
        self, predict: Callable[[Tensor], Mapping[str, Tensor]], classes: int
    ) -> dict[str, float]:
        """Accuracies on val over all ranks, for each named score that `predict` gives.

        Returns:
            e.g. {"k20_top1": 0.71, "k20_top5": 0.9, "images": 50000}.
        """
        x, y = self.parts[1].local()
        nothing = predict(x[:0])
        metrics = {name: accuracy(classes).to(self.device) for name in nothing}
        for start in range(0, len(y), SCORED):
            labels = y[start : start + SCORED].to(self.device)
            for name, scores in predict(x[start : start + SCORED]).items():
                metrics[name].update(scores.to(self.device), labels)
        with warnings.catch_warnings():
            # A rank without an image of val has nothing to add; torchmetrics takes it for a slip.
            warnings.filterwarnings("ignore", "The ``compute`` method of metric")
            found = {
                f"{name}_{key}": round(float(value), 6)
                for name, metric in metrics.items()
                for key, value in metric.compute().items()
            }
        images = gather(torch.tensor([len(y)], device=self.device)).sum()
        return {**found, "images": int(images)}
