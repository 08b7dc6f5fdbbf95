"""How well a mask agrees with the truth: region similarity J and contour accuracy F.

As defined by DAVIS (Perazzi et al., 2016) and computed by its 2017 evaluation (arXiv:1704.00675).
Sums of slices and no convolution, so that the numbers are the same on every device.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

# Contour pixels agree within this part of the image's diagonal.
TOLERANCE = 0.008


def region_similarity(
    found: Bool[Tensor, "M H W"], truth: Bool[Tensor, "M H W"]
) -> Float[Tensor, " M"]:
    """J, the intersection over union of each pair of masks; 1 where both are empty."""
    shared = (found & truth).sum((1, 2)).double()
    union = (found | truth).sum((1, 2)).double()
    return torch.where(union == 0, 1.0, shared / union.clamp(min=1))


def contour_accuracy(
    found: Bool[Tensor, "M H W"],
    truth: Bool[Tensor, "M H W"],
    *,
    tolerance: float = TOLERANCE,
) -> Float[Tensor, " M"]:
    """F, the harmonic mean of precision and recall of contour pixels, of each pair of masks.

    A pixel of a contour is right if the other contour passes within `reach` of it. Without any
    contour in both masks F is 1, without one in one of them 0.

    Args:
        found: predicted masks.
        truth: the true ones.
        tolerance: of the diagonal, see `reach`.
    """
    radius = reach(found.shape[1], found.shape[2], tolerance)
    mine, theirs = contours(found), contours(truth)
    precision = _share(mine & dilate(theirs, radius), mine)
    recall = _share(theirs & dilate(mine, radius), theirs)
    both = precision + recall
    return torch.where(both == 0, 0.0, 2 * precision * recall / both.clamp(min=1e-300))


def reach(height: int, width: int, tolerance: float = TOLERANCE) -> int:
    """How many pixels two contours may be apart: ceil(tolerance * diagonal), 8 at 480 x 854."""
    return math.ceil(tolerance * math.hypot(height, width))


def contours(masks: Bool[Tensor, "M H W"]) -> Bool[Tensor, "M H W"]:
    """Pixels whose neighbour to the right, below or diagonally below is on the other side.

    Contours are one pixel wide and lie half a pixel towards the origin from the true border. In
    the last row only the right neighbour counts, in the last column only the one below; the border
    of the image is no contour.
    """
    # Repeating the last row and column says just that: what is missing is no change.
    padded = torch.cat([masks, masks[:, -1:]], dim=1)
    padded = torch.cat([padded, padded[:, :, -1:]], dim=2)
    here, right, below, across = (
        padded[:, :-1, :-1], padded[:, :-1, 1:], padded[:, 1:, :-1], padded[:, 1:, 1:],
    )  # fmt: skip
    return (here ^ right) | (here ^ below) | (here ^ across)


class _Row(NamedTuple):
    offset: int  # rows below the centre
    half: int  # columns to either side


def disk(radius: int) -> list[_Row]:
    """The disk x² + y² <= radius² as rows of pixels."""
    return [_Row(y, math.isqrt(radius * radius - y * y)) for y in range(-radius, radius + 1)]


def dilate(masks: Bool[Tensor, "M H W"], radius: int) -> Bool[Tensor, "M H W"]:
    """Every pixel within `radius` of a pixel of the mask.

    A row of the disk holds a pixel of the mask if a running count grows over it, so the time goes
    with the radius and not with its square.
    """
    height, width = masks.shape[1:]
    padded = F.pad(masks.to(torch.int32), (radius + 1, radius, radius, radius))
    counted = padded.cumsum(2, dtype=torch.int32)  # (M, H + 2r, W + 2r + 1)
    near = torch.zeros_like(masks)
    for offset, half in disk(radius):
        rows = counted[:, radius + offset : radius + offset + height]
        last = rows[:, :, radius + 1 + half : radius + 1 + half + width]
        before = rows[:, :, radius - half : radius - half + width]
        near |= last > before
    return near


def _share(part: Bool[Tensor, "M H W"], whole: Bool[Tensor, "M H W"]) -> Float[Tensor, " M"]:
    """Of the pixels of `whole` those in `part`; 1 where there are none."""
    pixels = whole.sum((1, 2)).double()
    return torch.where(pixels == 0, 1.0, part.sum((1, 2)).double() / pixels.clamp(min=1))
