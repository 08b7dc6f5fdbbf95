"""Transformations of images with a map of where each patch has gone (Vanyan et al., 2401.00463).

Pixels are areas: the first pixel of a row covers 0 to 1, so an image of W pixels ends at W and a
patch of size P has its centre at P / 2, P / 2 + P, ... A warp is a function of (seed, key of the
image, its own name); the map is a function of the warp alone and the same for all images.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torchvision.transforms.v2.functional as TF
from jaxtyping import Float, Int
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode

from contramask.functional.degradations import Degradation
from contramask.types import UserError

Kind = Literal["none", "shift", "blur", "noise", "rotate", "scale"]

_WORD = re.compile(r"(none|shift|blur|noise|rotate|scale)(-?\d+(?:\.\d+)?)?")
ALLOWED = (
    "none, shift3 (pixels), blur4 (standard deviation in pixels), noise20 (standard deviation in "
    "levels of 255), rotate10 (degrees), scale0.8 (above 0)"
)


@dataclass(frozen=True)
class Warp:
    """One transformation and how much of it.

    Attributes:
        kind: `none`; `shift`, `amount` whole pixels to the right and as many down; `blur`, a
            Gaussian with a standard deviation of `amount` pixels; `noise`, Gaussian on every pixel
            and channel, with a standard deviation of `amount` / 255 (both as `Degradation` does
            it); `rotate`, by `amount` degrees clockwise about the centre; `scale`, `amount` times
            larger about the centre.
        amount: see above. Shifts and rotations may be negative.

    Raises:
        UserError: for an amount that the kind cannot have.
    """

    kind: Kind
    amount: float = 0.0

    def __post_init__(self) -> None:
        whole = self.kind != "shift" or self.amount == int(self.amount)
        above = {"blur": 0.0, "scale": 0.0, "noise": 0.0}.get(self.kind, -math.inf)
        if not whole or not self.amount > above:
            raise UserError(f"warp: {str(self)!r} is none of {ALLOWED}; set warps")

    @classmethod
    def parse(cls, text: str) -> "Warp":
        """`rotate10` and the like. Raises `UserError`."""
        found = _WORD.fullmatch(text)
        if not found or (found[2] is None) != (found[1] == "none"):
            raise UserError(f"warp: {text!r} is none of {ALLOWED}; set warps")
        return cls(cast("Kind", found[1]), float(found[2] or 0))

    def __str__(self) -> str:
        return self.kind if self.kind == "none" else f"{self.kind}{self.amount:g}"

    @property
    def moves(self) -> bool:
        """Whether patches change their place."""
        return self.kind in ("shift", "rotate", "scale")


def warp(
    images: Float[Tensor, "B 3 H W"],
    wanted: Warp,
    *,
    keys: Sequence[str],
    patch: int,
    seed: int = 0,
) -> tuple[Float[Tensor, "B 3 H W"], Int[Tensor, " N"]]:
    """Images transformed, and which patch of the original lies where.

    What comes in from beyond the border is black; the blur mirrors the image there. Places between
    pixels are interpolated bilinearly. Results are in [0, 1] and not rounded to 8 bits.

    Args:
        images: in [0, 1], not normalised.
        wanted: which warp.
        keys: a name of each image, of which its noise is a function.
        patch: P, the side of a patch in pixels.
        seed: of the noise.

    Returns:
        The images, and `origins`.
    """
    size = (images.shape[2], images.shape[3])
    if wanted.moves:
        angle, pixels, scale = _affine(wanted)
        moved = TF.affine(
            images,
            angle=angle,
            translate=[pixels, pixels],
            scale=scale,
            shear=[0.0, 0.0],
            # Whole pixels need no interpolation, which would leave its rounding.
            interpolation=InterpolationMode.BILINEAR if pixels == 0 else InterpolationMode.NEAREST,
        )
    elif wanted.kind in ("blur", "noise"):
        moved = Degradation(wanted.kind, wanted.amount)(images, keys, seed=seed)
    else:
        moved = images
    return moved.clamp(0, 1), origins(wanted, size, patch)


@torch.no_grad()
def origins(wanted: Warp, size: tuple[int, int], patch: int) -> Int[Tensor, " N"]:
    """For each patch of the warped image the number of the original's patch that is there now.

    The centre of the patch is traced back to the original; the answer is the patch in which it
    lies, and so the one whose own centre, warped, comes nearest to it (the warps keep angles). On
    an edge between two patches it is the one to the right or below. -1: the centre lies outside the
    original, so the patch shows nothing of it.

    Args:
        wanted: which warp.
        size: (H, W) of the image in pixels, multiples of P.
        patch: P.

    Returns:
        Patches are counted row by row from 0.

    Raises:
        UserError: if the image is no whole number of patches.
    """
    if size[0] % patch or size[1] % patch:
        raise UserError(
            f"warp: an image of {size[0]} x {size[1]} pixels is no whole number of patches of "
            f"{patch}; set the size of the images to a multiple"
        )
    rows, columns = size[0] // patch, size[1] // patch
    angle, pixels, scale = _affine(wanted)
    y = (torch.arange(rows, dtype=torch.float64)[:, None] + 0.5) * patch - size[0] / 2 - pixels
    x = (torch.arange(columns, dtype=torch.float64)[None] + 0.5) * patch - size[1] / 2 - pixels
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    # Forwards a point (x, y) from the centre goes to scale (x cos - y sin, x sin + y cos).
    from_x = (x * cos + y * sin) / scale + size[1] / 2
    from_y = (y * cos - x * sin) / scale + size[0] / 2
    # A hair to the right, so that rounding does not decide what lies on an edge.
    column, row = ((p / patch + 1e-9).floor().long() for p in (from_x, from_y))
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    return (row * columns + column).masked_fill(~inside, -1).flatten()


def _affine(wanted: Warp) -> tuple[float, int, float]:
    """Degrees clockwise, pixels right and down, scale."""
    angle = wanted.amount if wanted.kind == "rotate" else 0.0
    pixels = int(wanted.amount) if wanted.kind == "shift" else 0
    return angle, pixels, wanted.amount if wanted.kind == "scale" else 1.0
