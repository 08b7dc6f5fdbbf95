"""The members of a sample -> tensors, for training (views) and for a clean look (one square)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

from contramask.data.decode import MIN_SIDE, open_picture
from contramask.data.faults import BadSample
from contramask.data.tarball import IMAGES
from contramask.data.views import IMAGENET_MEAN, IMAGENET_STD, EvalView, Example, Views

CLEAN = "clean"  # the name of the view of `CleanExamples`


@dataclass(frozen=True)
class Images:
    """What the images and labels of a run are.

    Attributes:
        size: pixels a side of the clean view of evaluation.
        resize: the shorter side before its central square is cut; None: 8/7 of `size`.
        mean: subtracted from the channels, which are in [0, 1].
        std: what the channels are divided by.
        min_side: images with a smaller side count as bad; set it to the patch size.
        classes: how many; None: as `classes.json` beside the shards, or their index, says.
    """

    size: int = 224
    resize: int | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    min_side: int = 2
    classes: int | None = None


class Labelled(NamedTuple):
    """Something of an image, and its label (-1 where unknown)."""

    content: Any
    label: int


class Examples:
    """Which member is the image and what the label means; the base of both below.

    Args:
        classes: labels are 0 .. classes - 1; 0: any label is allowed.
        required: whether a sample must have a label.
        min_side: images with a smaller side, in pixels, count as bad.
    """

    def __init__(self, *, classes: int = 0, required: bool = False, min_side: int = 2) -> None:
        self.classes, self.required, self.min_side = classes, required, min_side

    def image(self, members: Mapping[str, bytes]) -> bytes:
        """The bytes of the image. Raises `BadSample`, or `BadImage` if it is too small."""
        data = next((members[suffix] for suffix in IMAGES if suffix in members), None)
        if data is None:
            raise BadSample("missing key", f"no image, only {', '.join(sorted(members)) or 'none'}")
        if self.min_side > MIN_SIDE:
            open_picture(data, min_side=self.min_side)
        return data

    def label(self, members: Mapping[str, bytes]) -> int:
        """The label, -1 if there is none. Raises `BadSample`."""
        text = members.get("cls")
        if text is None:
            if self.required:
                raise BadSample("missing key", "no .cls")
            return -1
        try:
            label = int(text)
        except ValueError:
            raise BadSample("label", f"{text[:20]!r} is not a number") from None
        if label < 0 or (self.classes and label >= self.classes):
            top = f"to {self.classes - 1}" if self.classes else "on"
            raise BadSample("label", f"{label}; labels are whole numbers from 0 {top}")
        return label


class TrainExamples:
    """Decodes a sample into the views of its image; collates them with their labels."""

    def __init__(self, views: Views, *, reads: Examples) -> None:
        self.views, self.reads = views, reads

    def decode(self, members: Mapping[str, bytes], key: int) -> Labelled:
        """One sample. Raises `BadSample` or `BadImage`."""
        image, label = self.reads.image(members), self.reads.label(members)
        return Labelled(self.views(image, key), label)

    def collate(self, items: list[Labelled]) -> dict[str, Any]:
        """`views` uint8 (V, B, 3, H, W), `photometric` (V, B, P), `label` (B,)."""
        examples: list[Example] = [item.content for item in items]
        views, photometric = self.views.collate(examples)
        return {"views": views, "photometric": photometric, "label": _labels(items)}


class CleanExamples:
    """Decodes a sample into the central square of its image."""

    def __init__(self, view: EvalView, *, reads: Examples) -> None:
        self.view, self.reads = view, reads

    def decode(self, members: Mapping[str, bytes], key: int) -> Labelled:
        """One sample. Raises `BadSample` or `BadImage`."""
        image, label = self.reads.image(members), self.reads.label(members)
        return Labelled(self.view(image), label)

    def collate(self, items: list[Labelled]) -> dict[str, Any]:
        """`views` {"clean": uint8 (1, B, 3, S, S)}, `label` (B,)."""
        squares: list[UInt8[Tensor, "3 S S"]] = [item.content for item in items]
        return {"views": {CLEAN: torch.stack(squares)[None]}, "label": _labels(items)}


def _labels(items: list[Labelled]) -> Tensor:
    return torch.tensor([item.label for item in items], dtype=torch.long)
