"""Images with a mask of labels, cut into tiles, for probes that read single patches.

A sample is KEY.jpg (or another image) with KEY.seg.png, a mask whose pixels are numbers of classes.
"""

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Int16, UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor

from contramask.data import geometry
from contramask.data.decode import open_picture
from contramask.data.examples import Examples
from contramask.data.faults import BadSample
from contramask.data.geometry import Interpolation
from contramask.errors import UserError
from contramask.functional.segmentation import VOID, Edge, PatchLabel, Tiling, nearest_index
from contramask.types import fold

MASK = "seg.png"
_PNG = b"\x89PNG\r\n\x1a\n"
_BITS, _COLOUR = 24, 25  # where the header of a PNG has its bits a sample and its kind of colour
_KINDS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGB with alpha"}
# What Pillow raises on damaged files.
_DAMAGE = (OSError, ValueError, SyntaxError, EOFError)


@dataclass(frozen=True)
class Dense:
    """How images and masks become tiles and labelled patches.

    Attributes:
        classes: labels are 0 .. classes - 1.
        ignore: the label of pixels that are neither learned nor scored.
        net: pixels a side that the network sees; tiles of another size are resized to them.
        patch: pixels a side of a patch of the network.
        tile: pixels a side of a tile; None: as `net`.
        size: to what an image is resized first: a factor, (height, width), or None: not at all.
        edge: where tiles do not divide the image, see `Tiling`.
        label: of a patch, see `Tiling.labels`.

    Raises:
        UserError: for numbers that are not allowed.
    """

    classes: int
    ignore: int = 255
    net: int = 224
    patch: int = 16
    tile: int | None = None
    size: tuple[int, int] | float | None = None
    edge: Edge = "pad"
    label: PatchLabel = "nearest"

    def __post_init__(self) -> None:
        if not 2 <= self.classes <= 256:
            raise UserError(
                f"segmentation: classes is {self.classes}; masks of 8 bits tell 2 to 256 apart; "
                "set --classes"
            )
        if self.net % self.patch:
            raise UserError(
                f"segmentation: the network sees tiles of {self.net} pixels, which are no whole "
                f"number of patches of {self.patch}; set --images.size to a multiple"
            )
        sides = (
            self.size if isinstance(self.size, tuple) else (1 if self.size is None else self.size,)
        )
        if min(sides) <= 0 or (len(sides) == 1 and max(sides) > 16):
            raise UserError(
                f"segmentation: size is {self.size}; allowed are [height, width] in pixels and a "
                "factor in (0, 16]; set --size"
            )
        _ = self.tiling

    @property
    def tiling(self) -> Tiling:
        """The tiles of the resized image."""
        return Tiling(self.tile or self.net, self.net // self.patch, self.edge)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of an image when it is cut."""
        if isinstance(self.size, tuple):
            return self.size
        factor = 1.0 if self.size is None else self.size
        return max(1, round(factor * height)), max(1, round(factor * width))


class DenseImage(NamedTuple):
    """One image, cut.

    `mask` and `picture` are the whole ones, at the size they came in; void pixels are -1.
    """

    tiles: UInt8[Tensor, "T 3 S S"]
    labels: Int16[Tensor, "T N"]
    mask: Int16[Tensor, "H W"]
    picture: UInt8[Tensor, "H W 3"] | None


class DenseExamples:
    """Decodes a sample into tiles and labels of patches; collates the tiles of several images.

    Args:
        dense: how.
        reads: which member is the image.
        fill: RGB behind the edge of an image, 0 to 255: what becomes 0 when it is normalised.
        patches: labelled patches of an image whose labels are kept, drawn at random; None: all.
        pictures: whether the images themselves are wanted too.
        interpolation: of images, antialiased; masks are resized nearest-exact.
    """

    def __init__(
        self,
        dense: Dense,
        *,
        reads: Examples,
        fill: tuple[int, int, int] = (0, 0, 0),
        patches: int | None = None,
        pictures: bool = False,
        interpolation: Interpolation = "bicubic",
    ) -> None:
        self.dense, self.reads, self.patches, self.pictures = dense, reads, patches, pictures
        self.fill = torch.tensor(fill)
        self.interpolation: Interpolation = interpolation

    def decode(self, members: Mapping[str, bytes], key: int) -> DenseImage:
        """One sample.

        Raises:
            BadSample: a mask is missing, damaged or of another size than its image.
            BadImage: the image is damaged.
            UserError: masks are of a kind that has no labels, or have labels out of range.
        """
        image = open_picture(self.reads.image(members)).pixels()
        if MASK not in members:
            raise BadSample("missing key", f"no .{MASK}")
        mask = self.labels(members[MASK], size=image.shape[:2])
        h, w = self.dense.resized(*mask.shape)
        small = torch.from_numpy(geometry.resize(image, h, w, self.interpolation))
        rows, columns = nearest_index(mask.shape[0], h), nearest_index(mask.shape[1], w)
        tiling, whole = self.dense.tiling, torch.from_numpy(mask)
        labels = tiling.labels(
            whole[rows][:, columns], classes=self.dense.classes, rule=self.dense.label
        )
        tiles = np.stack([self._seen(tile.numpy()) for tile in tiling.cut(small, self.fill)])
        return DenseImage(
            torch.from_numpy(tiles).permute(0, 3, 1, 2).contiguous(),
            self._some(labels, key).to(torch.int16),
            whole,
            torch.from_numpy(image) if self.pictures else None,
        )

    def collate(self, items: list[DenseImage]) -> dict[str, Any]:
        """Tiles of all images one after the other.

        `tiles` uint8 (T, 3, S, S), `labels` (T, N), `counts`: tiles of each image, `masks`: a list
        of (H, W), `pictures`: a list of (H, W, 3), or empty.
        """
        return {
            "tiles": torch.cat([item.tiles for item in items]),
            "labels": torch.cat([item.labels for item in items]).long(),
            "counts": [len(item.tiles) for item in items],
            "masks": [item.mask for item in items],
            "pictures": [item.picture for item in items if item.picture is not None],
        }

    def labels(self, data: bytes, *, size: tuple[int, int]) -> Int16[ndarray, "H W"]:
        """The labels of a mask's pixels, -1 where they are ignored. Raises as `decode`."""
        mask, dense = read_mask(data, size=size), self.dense
        void = mask == dense.ignore
        if (wrong := mask[(mask >= dense.classes) & ~void]).size:
            raise UserError(
                f"segmentation: a mask has the label {wrong[0]}; labels are 0 to "
                f"{dense.classes - 1}, and {dense.ignore} where they are ignored; set --classes "
                "and --ignore as the masks are labelled"
            )
        return np.where(void, np.int16(VOID), mask.astype(np.int16))

    def _seen(self, tile: UInt8[ndarray, "S S 3"]) -> UInt8[ndarray, "s s 3"]:
        return geometry.resize(tile, self.dense.net, self.dense.net, self.interpolation)

    def _some(self, labels: Int[Tensor, "T N"], key: int) -> Int[Tensor, "T N"]:
        """At most `patches` of the labels, the others void."""
        known = (labels != VOID).flatten().nonzero()[:, 0]
        if self.patches is None or len(known) <= self.patches:
            return labels
        generator = torch.Generator().manual_seed(fold(key, "patches"))
        chosen = known[torch.randperm(len(known), generator=generator)[: self.patches]]
        kept = torch.full_like(labels, VOID)
        kept.view(-1)[chosen] = labels.flatten()[chosen]
        return kept


def read_mask(data: bytes, *, size: tuple[int, int]) -> UInt8[ndarray, "H W"]:
    """The numbers a PNG's pixels have: grey values of 8 bits, or places in its palette.

    Args:
        data: the file.
        size: height and width of the image it belongs to.

    Raises:
        BadSample: it is damaged, or of another size by its header: then nothing is decoded.
        UserError: it is a PNG of another kind, such as RGB: colours are no labels.
    """
    if data[:8] != _PNG or len(data) <= _COLOUR:
        raise BadSample("mask", "not a PNG")
    bits, colour = data[_BITS], data[_COLOUR]
    if not (colour == 3 or (colour == 0 and bits == 8)):
        raise UserError(
            f"segmentation: a mask is a PNG of {bits} bits, {_KINDS.get(colour, colour)}; labels "
            "are read from grey of 8 bits or a palette; convert the masks so that a pixel's value "
            "is the number of its class"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of many pixels: its image was allowed as many
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                width, height = image.size
                if (height, width) != size:
                    told = f"{height} x {width} pixels, its image {size[0]} x {size[1]}"
                    raise BadSample("mask size", told)
                return np.array(image)
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("mask size", str(error)) from None
    except _DAMAGE as error:
        raise BadSample("mask", f"{type(error).__name__}: {error}") from None
