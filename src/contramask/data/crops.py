"""One view's configuration, and the draws for one image: where to cut, what to do with colours."""

import hashlib
from dataclasses import dataclass

import numpy as np

from contramask.data import geometry, photometric
from contramask.data.geometry import Box, Interpolation
from contramask.data.photometric import Photometric
from contramask.errors import UserError

Plan = list[tuple[Box, tuple[float, ...]]]  # of each crop: where, and the photometric row

_UNIFORMS = geometry.UNIFORMS + photometric.UNIFORMS  # of one crop


@dataclass(frozen=True)
class Crops:
    """A view: `number` random crops of `size` x `size` pixels.

    Attributes:
        number: how many crops.
        size: pixels a side.
        scale: range of the crop's area, as a fraction of the image's.
        ratio: range of width / height before the resize.
        interpolation: of the resize, which is antialiased.
        flip: probability of mirroring left to right.
        photometric: none, one for all crops, or one for each crop.
    """

    number: int = 1
    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bicubic"
    flip: float = 0.5
    photometric: tuple[Photometric, ...] = ()

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise UserError(f"view: {problem}; set it where the view is given")

    def _problem(self) -> str | None:
        if self.number < 1 or self.size < 1:
            return f"number is {self.number} and size {self.size}; both are at least 1"
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            return f"scale is {self.scale}; it is a range in (0, 1], smaller number first"
        if not 0 < self.ratio[0] <= self.ratio[1]:
            return f"ratio is {self.ratio}; it is a range above 0, smaller number first"
        if not 0 <= self.flip <= 1:
            return f"flip is {self.flip}; it is a probability in [0, 1]"
        if len(self.photometric) not in (0, 1, self.number):
            return (
                f"photometric has {len(self.photometric)} entries for {self.number} crops; "
                "give none, one for all crops, or one for each crop"
            )
        for one in self.photometric:
            if one.blur > 0 and photometric.radius(one.sigma[1]) >= self.size:
                return f"sigma is {one.sigma} for crops of {self.size} pixels; take a smaller one"
        return None

    def photometric_of(self, crop: int) -> Photometric | None:
        """What may happen to the colours of this crop."""
        if not self.photometric:
            return None
        return self.photometric[crop if len(self.photometric) > 1 else 0]

    def plan(self, name: str, key: int, height: int, width: int) -> Plan:
        """The draws for an image of height x width pixels, a function of (key, name, crop).

        Another number of crops, another view or another photometric setting moves none of them.
        """
        u = uniforms(key, name, count=self.number * _UNIFORMS)
        plan = []
        for crop in range(self.number):
            own = u[crop * _UNIFORMS : (crop + 1) * _UNIFORMS]
            box = geometry.draw_box(
                own, height, width, scale=self.scale, ratio=self.ratio, flip=self.flip
            )
            config = self.photometric_of(crop)
            row = config.row(own[geometry.UNIFORMS :]) if config else photometric.IDENTITY
            plan.append((box, row))
        return plan


def uniforms(*place: int | str, count: int) -> list[float]:
    """Numbers in [0, 1) with 53 bits that are a function of the place; more of them begin alike.

    An extendable hash: five times faster than setting up one of NumPy's generators for each view.
    """
    text = "\x1f".join(map(str, place)).encode()
    words = np.frombuffer(hashlib.shake_128(text).digest(8 * count), "<u8")
    return ((words >> np.uint64(11)) * 2.0**-53).tolist()
