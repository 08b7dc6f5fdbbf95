"""Crop boxes as torchvision's RandomResizedCrop draws them, cut and resized in one operation."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

TRIES = 10
UNIFORMS = 2 * TRIES + 3  # how many uniform numbers a box and its flip are made of

Interpolation = Literal["bilinear", "bicubic"]
Image = UInt8[np.ndarray, "H W 3"]


class Box(NamedTuple):
    """A rectangle of an upright image, in pixels, and whether it is mirrored left to right.

    With a `corner` (row, column) the crop is not the whole of the resized rectangle but begins
    there; it is a place in the result, after the mirror.
    """

    top: int
    left: int
    height: int
    width: int
    flip: bool = False
    corner: tuple[int, int] | None = None


def draw_box(
    u: Sequence[float],
    height: int,
    width: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
) -> Box:
    """A box of area in `scale` (of the image's) and width / height in `ratio`, log-uniform.

    Ten tries with `UNIFORMS` uniform numbers in [0, 1); then the largest central box whose shape
    is allowed (arXiv:1409.4842 as in torchvision).
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    mirrored = u[2 * TRIES + 2] < flip
    for k in range(TRIES):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u[2 * k])
        shape = math.exp(low + (high - low) * u[2 * k + 1])
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            top = int(u[2 * TRIES] * (height - h + 1))
            left = int(u[2 * TRIES + 1] * (width - w + 1))
            return Box(top, left, h, w, mirrored)
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return Box((height - h) // 2, (width - w) // 2, h, w, mirrored)


def shrunk(box: Box, factor: int, height: int, width: int) -> Box:
    """The box in an image of height x width that is `factor` times smaller, to whole pixels."""
    # A box at the far edge may be rounded to a place behind it.
    top = min(round(box.top / factor), height - 1)
    left = min(round(box.left / factor), width - 1)
    bottom = min(max(round((box.top + box.height) / factor), top + 1), height)
    right = min(max(round((box.left + box.width) / factor), left + 1), width)
    return box._replace(top=top, left=left, height=bottom - top, width=right - left)


def cut(
    image: Image, box: Box, *, size: int, interpolation: Interpolation
) -> UInt8[np.ndarray, "S S 3"]:
    """The box resized to size x size, antialiased as Pillow does (to a level; torch's kernel).

    OpenCV's resize is not used: its linear and cubic kernels alias when they shrink, and its area
    kernel is another filter, and slower.
    """
    part = image[box.top : box.top + box.height, box.left : box.left + box.width]
    cropped = resize(part, size, size, interpolation)
    return cv2.flip(cropped, 1) if box.flip else cropped


def resize(
    image: Image, height: int, width: int, interpolation: Interpolation
) -> UInt8[np.ndarray, "h w 3"]:
    """The whole image resized, antialiased."""
    if image.shape[:2] == (height, width):
        return np.ascontiguousarray(image)
    resized = np.empty((1, height, width, 3), np.uint8)
    _KERNEL[interpolation](
        _channels_second(image[None]),
        (height, width),
        align_corners=False,
        out=_channels_second(resized),
    )
    return resized[0]


def _channels_second(images: UInt8[np.ndarray, "1 H W 3"]) -> UInt8[Tensor, "1 3 H W"]:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


# What torch.nn.functional.interpolate(antialias=True) calls. Called so, with a place for the
# result whose channels lie together as the image's do, they spare it two transpositions.
_KERNEL = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
}
