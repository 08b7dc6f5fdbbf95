"""Where in depth classes can be read: nearest neighbours and ridge regression, block by block.

Both predict each probe image from all the others, so that no second set of images is needed.
"""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from contramask.analysis.analysis import Analysis, Seen, Tap, interval
from contramask.analysis.pooled import features_of, pooled_taps, stack
from contramask.analysis.reading import Reading
from contramask.functional.leave_one_out import leave_one_out_votes
from contramask.functional.ridge import leave_one_out_ridge
from contramask.types import Spec

log = logging.getLogger(__name__)

K = 20  # neighbours; DINO's protocol (arXiv:2104.14294)


class Predictions(NamedTuple):
    """What is predicted of each image from the final feature, to be compared between models."""

    scores: Float[Tensor, "N C"]
    label: Int[Tensor, " N"]


class Classes(Analysis):
    """Accuracy of a 20-NN vote and of ridge regression at every depth, each image left out once.

    Memory: 8 D bytes for each image and depth (class token and mean of patches).

    Attributes:
        predictions: of ridge regression from the final feature, the class token if there is one;
            None without labels.

    Args:
        images: the most images that are looked at.
        replicates: see `Analysis`.
    """

    def __init__(self, *, images: int | None = 1024, replicates: int = 0):
        super().__init__(replicates=replicates)
        self.images = images
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("label", [], dist_reduce_fx="cat")
        self.add_state("weights", [], dist_reduce_fx="cat")
        self.predictions: Predictions | None = None
        self._layers: tuple[str, ...] = ()

    def reset(self) -> None:
        super().reset()
        self.predictions = None

    def taps(self, spec: Spec) -> Mapping[str, Tap]:
        return pooled_taps(spec)

    def update(self, seen: Seen) -> None:
        pooled, self._layers = stack(seen.found)
        lists: Any = self
        lists.features.append(pooled)
        lists.label.append(seen.label)
        lists.weights.append(seen.weights)

    def readings(self) -> list[Reading]:
        features, label, weights = (
            _joined(getattr(self, n)) for n in ("features", "label", "weights")
        )
        known = label >= 0
        features, label, weights = features[known], label[known], weights[known].to(features.device)
        if len(label) < 2:
            log.warning("analysis: images have no labels; classes are left out")
            return []
        depths = features.permute(1, 2, 0, 3)  # (F, L, N, D)
        # A depth that is not finite says nothing; LAPACK would refuse it together with all others.
        broken = ~depths.isfinite().all(-1).all(-1)
        depths = depths.masked_fill(broken[..., None, None], 0.0)
        k, scores = min(K, len(label) - 1), _scores(depths, label)
        if not broken[0, -1]:
            self.predictions = Predictions(scores["ridge"][0, -1].cpu(), label.cpu())
        axes = {"feature": features_of(len(depths) - 1), "layer": self._layers}
        whom = f"from the other {len(label) - 1} images, {len(label.unique())} classes"
        abouts = {"knn": f"accuracy of {k}-NN", "ridge": "accuracy of ridge regression"}
        found = []
        for name, table in scores.items():
            right = (table.argmax(-1) == label).double()  # (F, L, N)
            total = weights.sum(0)[:, None, None].clamp(min=1)
            value, low, high = interval(torch.einsum("nr,fln->rfl", weights, right) / total)
            about = f"{abouts[name]} {whom}"
            reading = Reading(f"class/{name}", axes, value, "", about, low, high, missing=broken)
            found.append(reading)
        return found


def _scores(depths: Float[Tensor, "F L N D"], label: Int[Tensor, " N"]) -> dict[str, Tensor]:
    """Of each image by all the others: (F, L, N, C)."""
    classes, k = int(label.max()) + 1, min(K, len(label) - 1)
    votes = [
        leave_one_out_votes(normalize(x, dim=-1), label, ks=(k,), classes=classes)[k]
        for x in depths.flatten(0, 1)
    ]
    return {
        "knn": torch.stack(votes).unflatten(0, depths.shape[:2]),
        "ridge": leave_one_out_ridge(depths, label, classes).scores,
    }


def _joined(parts: list[Tensor] | Tensor) -> Tensor:
    return torch.cat(parts) if isinstance(parts, list) else parts
