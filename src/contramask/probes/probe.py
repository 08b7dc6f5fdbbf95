"""What every probe promises: labelled features in, a score per class out."""

from abc import ABC, abstractmethod

from jaxtyping import Float, Int
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from contramask.types import UserError


class Probe(nn.Module, ABC):
    """Reads labels from frozen features.

    A probe knows nothing of ranks: with several, each passes the same rows and holds the same
    probe. Rows of several ranks are first brought together by `probes.features.gather_rows`, which
    moves less than the gradients of a grid of heads would.
    """

    @abstractmethod
    def learn(self, x: Float[Tensor, "B F"], y: Int[Tensor, " B"]) -> None:
        """Take in one labelled batch; labels are 0..C-1."""

    @abstractmethod
    def predict(self, x: Float[Tensor, "B F"]) -> Float[Tensor, "B C"]:
        """A score per class, the largest for the class it believes in."""

    @property
    @abstractmethod
    def protocol(self) -> str:
        """How it was fitted, in one line to stand beside its number."""


def accuracy(classes: int) -> MetricCollection:
    """Top-1 accuracy, and top-5 where there are more than five classes: fractions of images.

    Summed over batches, and over ranks when it is computed.

    Raises:
        UserError: for fewer than two classes.
    """
    if classes < 2:
        raise UserError(
            f"probe: the labels have {classes} class; a probe needs at least two; see `cls` in the "
            "shards"
        )
    tops = (1, 5) if classes > 5 else (1,)
    return MetricCollection(
        {f"top{k}": MulticlassAccuracy(classes, top_k=k, average="micro") for k in tops},
        # Groups form when data come; a rank without any would then wait for the others for ever.
        compute_groups=False,
    )
