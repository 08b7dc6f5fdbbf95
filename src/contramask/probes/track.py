"""Videos told by frozen patches: objects followed from frame to frame, and found again later.

Label propagation is DINO's protocol (arXiv:2104.14294) with the measures of DAVIS 2017
(arXiv:1704.00675); instance matching over time gaps that of Vanyan et al. (arXiv:2401.00463).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from contramask.functional.propagation import labels_on_grid, mask_of_labels, propagate
from contramask.models.backbone import Backbone
from contramask.probes.features import Norm, frozen, patch_features
from contramask.probes.instances import InstanceMatching, Similarity
from contramask.probes.video_scores import agreement, scores_of
from contramask.types import UserError


@dataclass(frozen=True)
class TrackRecipe:
    """How objects are followed; the defaults are DINO's.

    Attributes:
        last_frames: frames before the current one whose labels propagate, beside the first frame.
        radius: of the window in patches; 0: no window.
        topk: context patches that count for a patch.
        temperature: of the affinity exp(cosine / temperature).
        deltas: gaps in frames over which instances are matched.
        similarity: of instances: dot (Vanyan et al.) or cosine.
        source: where in depth patches are read, see `Feature`.
        norm: the backbone's last norm, or none.

    Raises:
        UserError: for a number outside its range.
    """

    last_frames: int = 7
    radius: int = 12
    topk: int = 5
    temperature: float = 0.1
    deltas: tuple[int, ...] = (1, 3, 5, 9, 19)
    similarity: Similarity = "dot"
    source: str = "last"
    norm: Norm = "final"

    def __post_init__(self) -> None:
        numbers = {"last_frames": (self.last_frames, 0), "radius": (self.radius, 0)}
        numbers |= {"topk": (self.topk, 1), "deltas": (min(self.deltas, default=1), 1)}
        for name, (given, least) in numbers.items():
            if given < least:
                raise UserError(f"track: {name} is {given}; it is at least {least}; set --{name}")
        if not self.temperature > 0:
            raise UserError(
                f"track: temperature is {self.temperature:g}; it is more than 0; set --temperature"
            )

    def about(self) -> str:
        """In words, for a protocol."""
        window = f"a window of {self.radius} patches" if self.radius else "no window"
        return (
            f"label propagation from the first mask and the last {self.last_frames} frames, "
            f"{window}, top {self.topk}, temperature {self.temperature:g}; patches: {self.source}, "
            f"norm {self.norm}"
        )


@dataclass
class Clip:
    """A video as `track` reads it.

    Attributes:
        frames: normalised, 3 x H x W, H and W multiples of the patch, in order.
        mask: the true mask of a frame by its number, at the video's own size; None: there is none.
            That of frame 0 must be there.
        objects: indices of the objects to follow, as in the first mask.
        categories: of objects by index.
    """

    frames: Iterable[Float[Tensor, "3 H W"]]
    mask: Callable[[int], UInt8[Tensor, "h w"] | None]
    objects: tuple[int, ...]
    categories: Mapping[int, str]


def track(
    backbone: Backbone,
    clip: Clip,
    recipe: TrackRecipe,
    *,
    batch_size: int = 8,
    write: Callable[[int, UInt8[Tensor, "h w"]], None] | None = None,
) -> dict[str, Any]:
    """Follow the objects of a video, and match its instances over gaps.

    Holds the features of last_frames + 1 frames and those of the instances of the last max(deltas)
    frames, whatever the length of the video.

    Args:
        backbone: in any mode.
        clip: the video.
        recipe: how.
        batch_size: frames of one forward.
        write: gets the number and the predicted mask of every frame but the first.

    Returns:
        `frames`, `scored` (frames that J and F are taken over), `lost` (objects too small for the
        grid of patches), `objects` (index: `statistics` of J and F), and `instances`
        (gap: counts, see `InstanceMatching`), all as JSON holds it.

    Raises:
        UserError: features are not finite, or the first frame has no mask.
    """
    first = clip.mask(0)
    if first is None:
        raise UserError("track: the first frame has no mask; leave this video out")
    matching = InstanceMatching(recipe.deltas, recipe.similarity)
    scores: dict[str, list[Tensor]] = {"j": [], "f": []}
    follower: Follower | None = None
    count = 0
    with frozen(backbone):
        for features, grid in _features(backbone, clip.frames, recipe, batch_size):
            truth = clip.mask(count)
            if follower is None:
                follower = Follower(features, first, clip.objects, grid, recipe)
            else:
                found = follower.step(features, backbone.spec.patch)
                if write is not None:
                    write(count, found)
                if truth is not None:
                    for name, score in agreement(found, truth, clip.objects).items():
                        scores[name].append(score)
            if truth is not None:
                matching.add(count, features.T.unflatten(1, grid), truth, clip.categories)
            count += 1
    assert follower is not None, "a video without frames"
    return {
        "frames": count,
        "lost": follower.lost,
        **scores_of(scores, clip.objects),
        "instances": matching.counts(),
    }


class Follower:
    """Carries the labels of the first frame through a video.

    Attributes:
        lost: objects that no patch of the first frame belongs to; they are never found.

    Args:
        features: of the first frame.
        mask: of the first frame; its size is that of all masks.
        objects: the indices of the objects.
        grid: (rows, columns) of patches.
        recipe: how.
    """

    def __init__(
        self,
        features: Float[Tensor, "N F"],
        mask: UInt8[Tensor, "h w"],
        objects: tuple[int, ...],
        grid: tuple[int, int],
        recipe: TrackRecipe,
    ):
        self.grid, self.recipe, self.size = grid, recipe, (mask.shape[0], mask.shape[1])
        self.objects = torch.tensor(objects, device=features.device)
        labels = labels_on_grid(mask.to(features.device), self.objects, grid)
        self.lost = int((labels[:, 1:].sum(0) == 0).sum())
        self.first = (F.normalize(features, dim=1), labels)
        self.last: deque[tuple[Tensor, Tensor]] = deque(maxlen=recipe.last_frames)

    def step(self, features: Float[Tensor, "N F"], patch: int) -> UInt8[Tensor, "h w"]:
        """The mask of the next frame. Its labels propagate as probabilities."""
        known = [self.first, *self.last]
        target = F.normalize(features, dim=1)
        labels = propagate(
            target,
            torch.stack([x for x, _ in known]),
            torch.stack([y for _, y in known]),
            grid=self.grid,
            radius=self.recipe.radius,
            topk=self.recipe.topk,
            temperature=self.recipe.temperature,
        )
        self.last.append((target, labels))
        return mask_of_labels(labels, self.objects, grid=self.grid, patch=patch, size=self.size)


def _features(
    backbone: Backbone, frames: Iterable[Tensor], recipe: TrackRecipe, batch_size: int
) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """(patches (N, F), grid) of each frame."""
    left, number = iter(frames), 0
    while batch := list(islice(left, batch_size)):
        images = torch.stack(batch)
        grid = tuple(side // backbone.spec.patch for side in images.shape[2:])
        found = patch_features(backbone, images, source=recipe.source, norm=recipe.norm)
        for features in found:
            if not features.isfinite().all():
                raise UserError(
                    f"track: the features of frame {number} are not finite; the weights or the "
                    "precision (--trainer.precision) are broken"
                )
            yield features, (grid[0], grid[1])
            number += 1
