"""Colour jitter, greyscale, blur and solarisation: drawn per sample, applied in batch.

The draws are a row of numbers per crop (`FIELDS`), made on the host. What is done with them is a
pure function of (images, rows): `apply` here on whole batches on any device, without a branch that
depends on data and so without waiting for the device; `photometric_host.apply` on one image with
OpenCV in a loader's worker. Both do the four operations of the jitter in the drawn order, then
grey, blur, solarise, as SimCLR (arXiv:2002.05709), MoCo v3 (arXiv:2104.02057) and DINO
(arXiv:2104.14294) do, with torchvision's definition of every operation.

Blur is a Gaussian of the drawn sigma in pixels, cut at 3 sigma or to `taps`, reflected at the
border. MoCo v3's and DINO's code calls Pillow's, which is a box blur repeated three times; the two
are 0.4 to 0.7 levels of 255 apart on photographs, where the blur itself moves pixels by 2 to 11.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from contramask.data.blur import blur
from contramask.errors import UserError

# One row: three factors (1: unchanged), the hue's shift in turns (0: unchanged), the place of each
# of the four in their order, grey (1) or not (0), sigma in pixels (0: no blur), the value from
# which on pixels are inverted (256: none), and the length of the blur's kernel in pixels
# (0: 3 sigma).
FIELDS = (
    "brightness", "contrast", "saturation", "hue",
    "brightness_place", "contrast_place", "saturation_place", "hue_place",
    "grey", "sigma", "threshold", "taps",
)  # fmt: skip
IDENTITY = (1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 2.0, 3.0, 0.0, 0.0, 256.0, 0.0)
UNIFORMS = 10  # how many uniform numbers one row is made of
LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as torchvision rounds it
CHUNK = 128  # images at once: bounds the memory of the intermediate results


@dataclass(frozen=True)
class Photometric:
    """What may happen to the colours of a crop. The defaults do nothing.

    Attributes:
        jitter: probability of the colour jitter.
        strength: brightness, contrast, saturation: factors in [1 - s, 1 + s], not below 0;
            hue: shift in [-s, s] turns, s at most 0.5.
        grey: probability of greyscale.
        blur: probability of blur.
        sigma: range of the blur's standard deviation, pixels.
        solarise: probability of inverting the bright pixels.
        threshold: the value from which on solarisation inverts, 0 to 255.
        taps: length of the blur's kernel in pixels, odd (SimCLR 23 at 224 pixels, DINOv2 9); None:
            up to 3 sigma on either side.
    """

    jitter: float = 0.0
    strength: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    grey: float = 0.0
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    solarise: float = 0.0
    threshold: int = 128
    taps: int | None = None

    def __post_init__(self) -> None:
        for name in ("jitter", "grey", "blur", "solarise"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(
                    f"photometric: {name} is {getattr(self, name)}; it is a probability in [0, 1]; "
                    f"set {name} in the view's photometric"
                )
        if min(self.strength) < 0 or self.strength[3] > 0.5:
            raise UserError(
                f"photometric: strength is {self.strength}; brightness, contrast, saturation and "
                "hue are at least 0, and hue at most 0.5; set strength in the view's photometric"
            )
        if not 0 < self.sigma[0] <= self.sigma[1]:
            raise UserError(
                f"photometric: sigma is {self.sigma}; it is a range of pixels above 0, smaller "
                "number first; set sigma in the view's photometric"
            )
        if not 0 <= self.threshold <= 255:
            raise UserError(
                f"photometric: threshold is {self.threshold}; pixels have values 0 to 255; "
                "set threshold in the view's photometric"
            )
        if self.taps is not None and (self.taps < 3 or self.taps % 2 == 0):
            raise UserError(
                f"photometric: taps is {self.taps}; the blur's kernel has an odd number of pixels, "
                "3 or more, or is null for 3 sigma; set taps in the view's photometric"
            )

    def row(self, u: Sequence[float]) -> tuple[float, ...]:
        """The parameters of one crop (`FIELDS`) from `UNIFORMS` uniform numbers in [0, 1)."""
        factors, places = IDENTITY[:4], IDENTITY[4:8]
        if u[0] < self.jitter:
            b, c, s, h = self.strength
            factors = (
                _between(max(0.0, 1 - b), 1 + b, u[1]),
                _between(max(0.0, 1 - c), 1 + c, u[2]),
                _between(max(0.0, 1 - s), 1 + s, u[3]),
                _between(-h, h, u[4]),
            )
            places = _ORDERS[int(u[5] * len(_ORDERS))]
        sigma = _between(*self.sigma, u[8]) if u[7] < self.blur else 0.0
        threshold = float(self.threshold) if u[9] < self.solarise else 256.0
        grey, taps = float(u[6] < self.grey), float(self.taps or 0)
        return (*factors, *places, grey, sigma, threshold, taps)


def _between(low: float, high: float, u: float) -> float:
    return low + (high - low) * u


def _orders() -> tuple[tuple[float, ...], ...]:
    """The 24 ways to place four operations."""
    places: list[tuple[float, ...]] = [()]
    for n in range(4):
        places = [(*p[:i], float(n), *p[i:]) for p in places for i in range(n + 1)]
    return tuple(places)


_ORDERS = _orders()


def apply(
    images: UInt8[Tensor, "B 3 H W"], rows: Float[Tensor, "B P"], config: Photometric
) -> Float[Tensor, "B 3 H W"]:
    """The augmented images in [0, 1]. `config` only says which operations can be left out."""
    return torch.cat(
        [_apply(i, r, config) for i, r in zip(images.split(CHUNK), rows.split(CHUNK), strict=True)]
    )


def _apply(images: Tensor, rows: Tensor, config: Photometric) -> Tensor:
    x = images.float() / 255
    if config.jitter > 0:
        x = jitter(x, rows[:, 0:4], rows[:, 4:8])
    if config.grey > 0:
        x = mix(x, towards_grey(1 - rows[:, 8]), torch.zeros_like(rows[:, 8]))
    if config.blur > 0:
        x = blur(x, rows[:, 9], rows[:, 11])
    if config.solarise > 0:
        # Half a level earlier: as if rounded to 8 bits, so that 128 itself is always inverted.
        x = torch.where(x >= (_wide(rows[:, 10]) - 0.5) / 255, 1 - x, x)
    return x


def jitter(
    x: Float[Tensor, "B 3 H W"], factors: Float[Tensor, "B 4"], places: Float[Tensor, "B 4"]
) -> Float[Tensor, "B 3 H W"]:
    """Brightness, contrast, saturation and hue, each sample in its own order.

    The first three are blends, so one formula with per-sample numbers serves all; those before the
    hue go first, with the factors of the others at 1, and then those after it.
    """
    order = places[:, :3].argsort(dim=1)
    early = places[:, :3] < places[:, 3:]
    for now in (early, ~early):
        factor = torch.where(now, factors[:, :3], 1.0).gather(1, order)
        for k in range(3):
            x = _blend(x, order[:, k], factor[:, k])
        if now is early:
            x = hue(x, factors[:, 3])
    return x


def _blend(
    x: Float[Tensor, "B 3 H W"], which: Int[Tensor, " B"], factor: Float[Tensor, " B"]
) -> Float[Tensor, "B 3 H W"]:
    """factor * x + (1 - factor) * reference, clipped to [0, 1].

    The reference is black (0, brightness), the mean grey (1, contrast) or the grey image (2,
    saturation): each an affine map of the three colours.
    """
    matrix = towards_grey(torch.where(which == 2, factor, 1.0))
    matrix = matrix * torch.where(which == 2, 1.0, factor)[:, None, None]
    mean = x.mean((2, 3)) @ constant(LUMA, x.device)
    offset = torch.where(which == 1, (1 - factor) * mean, 0.0)
    return mix(x, matrix, offset).clamp_(0, 1)


def towards_grey(keep: Float[Tensor, " B"]) -> Float[Tensor, "B 3 3"]:
    """keep * x + (1 - keep) * grey(x), as a matrix of the three colours."""
    keep = keep[:, None, None]
    eye = torch.eye(3, device=keep.device)
    return keep * eye + (1 - keep) * constant(LUMA, keep.device)


def mix(
    x: Float[Tensor, "B 3 H W"], matrix: Float[Tensor, "B 3 3"], offset: Float[Tensor, " B"]
) -> Float[Tensor, "B 3 H W"]:
    """matrix @ colours + offset: one pass over the pixels."""
    return torch.baddbmm(offset[:, None, None], matrix, x.flatten(2)).view_as(x)


@lru_cache(maxsize=64)
def constant(values: tuple[float, ...], device: torch.device) -> Float[Tensor, " n"]:
    """Numbers kept on the device: to send them each time would wait for it."""
    return torch.tensor(values, device=device)


def hue(x: Float[Tensor, "B 3 H W"], shift: Float[Tensor, " B"]) -> Float[Tensor, "B 3 H W"]:
    """Turns the hue by `shift` turns at constant value and chroma (the HSV hexagon)."""
    red, green, blue = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    safe = torch.where(chroma == 0, 1.0, chroma)
    sixth = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixth = sixth + 6 * shift[:, None, None]
    offset = torch.arange(5, 0, -2, device=x.device)[:, None, None]  # 5, 3, 1 for R, G, B
    k = (offset + sixth[:, None]).remainder(6)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def _wide(x: Tensor) -> Tensor:
    return x[:, None, None, None]
