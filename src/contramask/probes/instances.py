"""Instances found again after a gap in time (Vanyan et al., arXiv:2401.00463, tracking)."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torchvision.ops import roi_align

Similarity = Literal["dot", "cosine"]
CELLS = 7
COUNTS: tuple[str, ...] = (
    "questions", "right", "chance", "gone", "single",
    "category_questions", "category_right", "category_chance",
)  # fmt: skip


class _Seen(NamedTuple):
    indices: list[int]
    features: Tensor  # (O, F * 49)


class InstanceMatching:
    """Which instance of frame t + δ is most like each of frame t, for several gaps δ.

    An instance is its box: RoIAlign 7 x 7 on the map of patch features, flattened. Questions are
    instances of frame t that are there in frame t + δ too, beside at least one other; the answer is
    right if the most similar instance of t + δ is the same one (or has the same category; there
    the instances of t + δ must have more than one).

    Args:
        deltas: gaps in frames.
        similarity: dot product, or cosine.
    """

    def __init__(self, deltas: tuple[int, ...], similarity: Similarity = "dot"):
        self.deltas = tuple(dict.fromkeys(deltas))
        self.similarity: Similarity = similarity
        self.seen: dict[int, _Seen] = {}
        self.found = {delta: dict.fromkeys(COUNTS, 0.0) for delta in self.deltas}

    def add(
        self,
        frame: int,
        features: Float[Tensor, "F gh gw"],
        mask: UInt8[Tensor, "h w"],
        categories: Mapping[int, str],
    ) -> None:
        """The next frame that has a mask.

        Args:
            frame: its number; numbers grow.
            features: of its patches on their grid.
            mask: the true one, of any size.
            categories: of objects by index; those of others are unknown.
        """
        if not self.deltas:
            return
        indices, boxes = boxes_of(mask.to(features.device))
        now = _Seen(indices.tolist(), instance_features(features, boxes, mask.shape))
        for delta in self.deltas:
            if frame - delta in self.seen:
                self._ask(self.seen[frame - delta], now, self.found[delta], categories)
        self.seen[frame] = now
        oldest = frame - max(self.deltas)
        self.seen = {t: seen for t, seen in self.seen.items() if t > oldest}

    def counts(self) -> dict[str, dict[str, float]]:
        """For each gap: `questions`, `right`, `chance` (the sum of 1 / instances to choose from),
        `gone` and `single` (instances left out: not there any more; without another beside them),
        and `category_questions`, `category_right`, `category_chance` likewise.
        """
        return {str(delta): dict(found) for delta, found in self.found.items()}

    def _ask(
        self, then: _Seen, now: _Seen, found: dict[str, float], categories: Mapping[int, str]
    ) -> None:
        there = [i for i, index in enumerate(then.indices) if index in now.indices]
        found["gone"] += len(then.indices) - len(there)
        if len(now.indices) < 2:
            found["single"] += len(there)
            return
        if not there:
            return
        best = similarities(then.features[there], now.features, self.similarity).argmax(1).tolist()
        offered = [categories.get(index) for index in now.indices]
        for place, choice in zip(there, best, strict=True):
            index = then.indices[place]
            found["questions"] += 1
            found["right"] += now.indices[choice] == index
            found["chance"] += 1 / len(now.indices)
            if None not in offered and len(set(offered)) > 1:
                mine = categories[index]
                found["category_questions"] += 1
                found["category_right"] += offered[choice] == mine
                found["category_chance"] += offered.count(mine) / len(offered)


def boxes_of(mask: UInt8[Tensor, "h w"]) -> tuple[Int[Tensor, " O"], Float[Tensor, "O 4"]]:
    """Indices of the objects in a mask, ascending, and their boxes (x0, y0, x1, y1) in pixels.

    A box ends where its last pixel ends: an object of one pixel has a box of 1 x 1.
    """
    indices = mask.unique()
    indices = indices[indices != 0].long()
    boxes = mask.new_zeros((len(indices), 4), dtype=torch.float32)
    for box, index in zip(boxes, indices, strict=True):
        y, x = (mask == index).nonzero(as_tuple=True)
        box[:] = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
    return indices, boxes


def instance_features(
    features: Float[Tensor, "F gh gw"], boxes: Float[Tensor, "O 4"], size: tuple[int, ...]
) -> Float[Tensor, "O K"]:
    """RoIAlign 7 x 7 of boxes on a map of patches, flattened: K = 49 F.

    Args:
        features: of the patches on their grid.
        boxes: in pixels of the mask, see `boxes_of`.
        size: (height, width) of the mask.
    """
    rows, columns = features.shape[1:]
    scale = boxes.new_tensor([columns / size[1], rows / size[0]]).repeat(2)
    rois = torch.cat([boxes.new_zeros((len(boxes), 1)), boxes * scale], dim=1)
    with torch.autocast(features.device.type, enabled=False):
        found = roi_align(features[None].float(), rois, CELLS, aligned=True)
    return found.flatten(1)


def similarities(
    queries: Float[Tensor, "Q K"], candidates: Float[Tensor, "O K"], similarity: Similarity
) -> Float[Tensor, "Q O"]:
    """Dot products, or cosines, of instances."""
    if similarity == "cosine":
        queries, candidates = F.normalize(queries, dim=1), F.normalize(candidates, dim=1)
    with torch.autocast(queries.device.type, enabled=False):
        return queries.float() @ candidates.float().mT


def rates(counts: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """`instance_delta1_rate` and the like from counts by gap; gaps without a question have none."""
    found: dict[str, Any] = {}
    for delta, count in counts.items():
        for kind, prefix in (("instance", ""), ("category", "category_")):
            asked = count[f"{prefix}questions"]
            if asked:
                found[f"{kind}_delta{delta}_rate"] = count[f"{prefix}right"] / asked
                found[f"{kind}_delta{delta}_chance_rate"] = count[f"{prefix}chance"] / asked
    return found
