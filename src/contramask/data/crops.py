"""One view's configuration, and the draws for one image: where to cut, what to do with colours."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from contramask.data import geometry, photometric
from contramask.data.blur import radius
from contramask.data.geometry import Box, Interpolation
from contramask.data.photometric import Photometric
from contramask.errors import UserError

Plan = list[tuple[Box, tuple[float, ...]]]  # of each crop: where, and the photometric row

_UNIFORMS = geometry.UNIFORMS + photometric.UNIFORMS  # of one crop


@dataclass(frozen=True)
class Window:
    """Makes the crops of a view windows of larger ones, which another view may share.

    CMAE (arXiv:2207.13532) compares two windows of 224 pixels of one crop of 256, at most 31 pixels
    apart.

    Attributes:
        canvas: pixels a side of the larger crop: the box that is drawn is resized to this.
        shift: the window's corner is at most this many pixels below, and right of, the canvas's; 0:
            at the corner.
        of: the view whose boxes and flips are used in place of own ones, crop by crop; `scale`,
            `ratio` and `flip` are given there. None: own ones.
    """

    canvas: int
    shift: int = 0
    of: str | None = None


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
        window: cut each crop from a larger one; None: a crop is the whole box.
    """

    number: int = 1
    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bicubic"
    flip: float = 0.5
    photometric: tuple[Photometric, ...] = ()
    window: Window | None = None

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
            if one.blur > 0 and radius(one.sigma[1], one.taps or 0) >= self.size:
                given = f"sigma is {one.sigma}" if one.taps is None else f"taps is {one.taps}"
                return f"{given} for crops of {self.size} pixels; take a smaller one"
        return self._window_problem()

    def _window_problem(self) -> str | None:
        w = self.window
        if w is None:
            return None
        if not 0 <= w.shift <= w.canvas - self.size:
            return (
                f"size is {self.size} and its window has canvas {w.canvas} and shift {w.shift}; "
                "shift is at least 0, and size + shift at most canvas"
            )
        if w.of is not None and (self.scale, self.ratio, self.flip) != _OWN:
            return f"scale, ratio or flip are given beside window.of: {w.of}, which decides them"
        return None

    def photometric_of(self, crop: int) -> Photometric | None:
        """What may happen to the colours of this crop."""
        if not self.photometric:
            return None
        return self.photometric[crop if len(self.photometric) > 1 else 0]

    @property
    def resized(self) -> int:
        """Pixels a side that a box is resized to."""
        return self.size if self.window is None else self.window.canvas

    def plan(
        self, name: str, key: int, height: int, width: int, *, shared: Plan | None = None
    ) -> Plan:
        """The draws for an image of height x width pixels, a function of (key, name, crop).

        Another number of crops, another view or another photometric setting moves none of them.
        `shared` is the plan of the view that `window.of` names.
        """
        u = uniforms(key, name, count=self.number * _UNIFORMS)
        corners = self._corners(name, key)
        plan = []
        for crop in range(self.number):
            own = u[crop * _UNIFORMS : (crop + 1) * _UNIFORMS]
            box = geometry.draw_box(
                own, height, width, scale=self.scale, ratio=self.ratio, flip=self.flip
            )
            config = self.photometric_of(crop)
            row = config.row(own[geometry.UNIFORMS :]) if config else photometric.IDENTITY
            if shared is not None:
                box = shared[crop % len(shared)][0]
            plan.append((box._replace(corner=corners[crop]), row))
        return plan

    def _corners(self, name: str, key: int) -> list[tuple[int, int] | None]:
        """Where on its canvas each crop begins, of draws of their own."""
        if self.window is None:
            return [None] * self.number
        u = uniforms(key, name, "window", count=2 * self.number)
        at = [int(x * (self.window.shift + 1)) for x in u]
        return list(zip(at[::2], at[1::2], strict=True))


# What a view leaves out whose boxes are another's.
_OWN = (Crops.scale, Crops.ratio, Crops.flip)


def check_windows(groups: Mapping[str, Crops]) -> None:
    """Raise a `UserError` unless every view that shares boxes finds them, one for each crop."""
    for name, group in groups.items():
        of = group.window.of if group.window else None
        if of is None:
            continue
        where = f"set data.views.{name}.window.of"
        if of not in groups or of == name:
            others = ", ".join(k for k in groups if k != name) or "no others"
            raise UserError(
                f"view {name!r} shares the boxes of {of!r}; there are {others}; {where}"
            )
        lender = groups[of]
        if lender.window is not None and lender.window.of is not None:
            raise UserError(
                f"view {name!r} shares the boxes of {of!r}, which has none of its own but those of "
                f"{lender.window.of!r}; {where}: {lender.window.of}"
            )
        if lender.number not in (1, group.number):
            raise UserError(
                f"view {name!r} has {group.number} crops and shares the boxes of {of!r}, which has "
                f"{lender.number}; it has 1, or as many; set data.views.{name}.number"
            )


def uniforms(*place: int | str, count: int) -> list[float]:
    """Numbers in [0, 1) with 53 bits that are a function of the place; more of them begin alike.

    An extendable hash: five times faster than setting up one of NumPy's generators for each view.
    """
    text = "\x1f".join(map(str, place)).encode()
    words = np.frombuffer(hashlib.shake_128(text).digest(8 * count), "<u8")
    return ((words >> np.uint64(11)) * 2.0**-53).tolist()
