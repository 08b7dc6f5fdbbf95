"""Tiles, patches and pixels: which patch tells of a pixel, and scores of labelled pixels.

An image is cut into square tiles, a network sees each tile as a grid of patches, and every pixel of
the image belongs to one patch of one tile. A label of a patch is thus a label of its pixels, and
predictions of patches are scored pixel by pixel without ever being drawn: the pixels of each class
in each patch, counted once, serve every probe.

Protocol: Vanyan et al., arXiv:2401.00463. All resizing of labels is nearest-exact: a place takes
the label of the pixel in which its middle lies (torch's `nearest-exact`, in whole numbers).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from contramask.types import UserError

VOID = -1  # the label of pixels and patches that are neither learned nor scored
Edge = Literal["pad", "overlap"]
PatchLabel = Literal["nearest", "majority"]


def nearest_index(length: int, size: int) -> Int[Tensor, " size"]:
    """Where each of `size` places finds its label when `length` labels are resized to them."""
    return (2 * torch.arange(size) + 1) * length // (2 * size)


@dataclass(frozen=True)
class Tiling:
    """Square tiles of an image and the patches of each tile.

    Patches are numbered tile by tile (row by row) and inside a tile row by row.

    Attributes:
        tile: pixels a side of a tile.
        grid: patches a side of a tile.
        edge: where tiles do not divide the image: `pad` fills up the last ones at the right and
            the bottom, `overlap` moves them back until they end with the image (one that is smaller
            than a tile is filled up all the same). Of pixels in two tiles the first has them.

    Raises:
        UserError: for a tile that has fewer pixels than patches a side.
    """

    tile: int
    grid: int
    edge: Edge = "pad"

    def __post_init__(self) -> None:
        if not 1 <= self.grid <= self.tile:
            raise UserError(
                f"tiles: tile is {self.tile} pixels and has {self.grid} patches a side; a patch "
                "is a pixel or more; set --tile larger"
            )

    def starts(self, length: int) -> list[int]:
        """Where tiles begin along a side of so many pixels."""
        starts = list(range(0, length, self.tile))
        if self.edge == "overlap":
            starts[-1] = max(0, length - self.tile)
        return starts

    def count(self, height: int, width: int) -> int:
        """How many tiles an image has."""
        return len(self.starts(height)) * len(self.starts(width))

    def cut(
        self, image: Shaped[Tensor, "H W *C"], fill: Shaped[Tensor, " ..."]
    ) -> Shaped[Tensor, "T S S *C"]:
        """The tiles; `fill` (a number, or one a channel) stands where the image has ended."""
        height, width = image.shape[:2]
        tiles = fill.to(image.dtype).expand(
            self.count(height, width), self.tile, self.tile, *image.shape[2:]
        )
        tiles = tiles.clone()
        corners = ((y, x) for y in self.starts(height) for x in self.starts(width))
        for tile, (y, x) in zip(tiles, corners, strict=True):
            part = image[y : y + self.tile, x : x + self.tile]
            tile[: part.shape[0], : part.shape[1]] = part
        return tiles

    def patch_of_pixel(
        self, height: int, width: int, *, seen: tuple[int, int] | None = None
    ) -> Int[Tensor, "H W"]:
        """The number of the patch that tells of each pixel.

        Predictions of patches `p` (P,) are joined to a whole mask by `p[patch_of_pixel(...)]`.

        Args:
            height: of the mask.
            width: of the mask.
            seen: the size to which the image was resized before it was cut; None: the same.
        """
        h, w = seen or (height, width)
        rows, columns = self._patch(height, h), self._patch(width, w)
        tile = (rows[0][:, None] * len(self.starts(w))) + columns[0]
        inside = rows[1][:, None] * self.grid + columns[1]
        return tile * self.grid**2 + inside

    def labels(
        self, mask: Int[Tensor, "H W"], *, classes: int, rule: PatchLabel = "nearest"
    ) -> Int[Tensor, "T N"]:
        """The label of each patch of a mask whose pixels are 0 .. classes - 1 or VOID.

        `nearest`: that of the pixel at the middle (the paper). `majority`: the one that most of
        its pixels have, void being one; of equals the first class. A patch beyond the edge of the
        image, or whose pixels belong to another tile, is void.
        """
        height, width = mask.shape
        tiles = self.count(height, width)
        if rule == "majority":
            patch = self.patch_of_pixel(height, width)
            marks = mask.where(mask != VOID, classes)
            counts = pixels_of_class(patch, marks, tiles * self.grid**2, classes + 1)
            most = counts.argmax(1)
            known = (most < classes) & (counts.sum(1) > 0)
            return most.where(known, VOID).view(tiles, -1)
        own = self._owned(height)[:, None, :, None] & self._owned(width)[None, :, None, :]
        own = own.reshape(tiles, self.tile, self.tile)
        cut = self.cut(mask, torch.tensor(VOID)).where(own, VOID)
        at = nearest_index(self.tile, self.grid)
        return cut[:, at][:, :, at].flatten(1).long()

    def _patch(self, pixels: int, seen: int) -> tuple[Tensor, Tensor]:
        """Along a side: the tile of each pixel, and the row of patches in it."""
        at = nearest_index(seen, pixels)
        tile = at // self.tile
        inside = at - torch.tensor(self.starts(seen))[tile]
        return tile, (2 * inside + 1) * self.grid // (2 * self.tile)

    def _owned(self, length: int) -> Bool[Tensor, "t S"]:
        """Along a side: which pixels of each tile are in the image and in no tile before."""
        starts = torch.tensor(self.starts(length))[:, None]
        at = starts + torch.arange(self.tile)
        return (at // self.tile == torch.arange(len(starts))[:, None]) & (at < length)


def pixels_of_class(
    patch: Int[Tensor, "H W"], mask: Int[Tensor, "H W"], patches: int, classes: int
) -> Int[Tensor, "P C"]:
    """How many pixels of each class lie in each patch; void ones are not counted."""
    known = mask != VOID
    cell = patch[known] * classes + mask[known]
    return torch.bincount(cell, minlength=patches * classes).view(patches, classes)


def confusion(
    pixels: Int[Tensor, "P C"], predicted: Int[Tensor, " P"]
) -> Int[Tensor, "truth predicted"]:
    """Pixels by true and predicted class when every pixel is given the class of its patch.

    Args:
        pixels: of each true class in each patch, see `pixels_of_class`.
        predicted: the class of each patch.
    """
    by_prediction = pixels.new_zeros((pixels.shape[1], pixels.shape[1]))
    return by_prediction.index_add(0, predicted, pixels).mT


class Scores(NamedTuple):
    """What a confusion matrix of pixels says; fractions.

    `iou` has None for a class that is neither in the truth nor in the predictions; such a class is
    left out of `miou`. One that is in the truth alone, or predicted alone, counts with 0.
    """

    miou: float
    pixel_top1: float
    iou: list[float | None]


def scores(confused: Int[Tensor, "C C"]) -> Scores:
    """Intersection over union of each class and their mean, and the share of right pixels.

    Raises:
        UserError: for a matrix without a pixel.
    """
    pixels = confused.double()
    right, total = pixels.diagonal(), pixels.sum()
    if total == 0:
        raise UserError(
            "segmentation: the masks of val have no labelled pixel; set --classes and --ignore "
            "as the masks are labelled, or data.val to other shards"
        )
    union = pixels.sum(0) + pixels.sum(1) - right
    iou = [r / u if u else None for r, u in zip(right.tolist(), union.tolist(), strict=True)]
    found = [value for value in iou if value is not None]
    return Scores(sum(found) / len(found), (right.sum() / total).item(), iou)
