"""The operations of `photometric`, one image at a time with OpenCV, in 8 bits.

Used in the loader's workers where there is no accelerator. OpenCV rounds to 8 bits after every
operation, as Pillow does; the result differs from the batched one by about a level.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from contramask.data.blur import radius

# A worker is one of many processes; OpenCV's own threads would only fight over the cores.
cv2.setNumThreads(0)

Image = UInt8[np.ndarray, "H W 3"]

_LUMA = np.array([[0.2989, 0.587, 0.114]], np.float32)
_EYE = np.eye(3, dtype=np.float32)


def apply(image: Image, row: Sequence[float]) -> Image:
    """The augmented image; the argument is not changed, but may be returned."""
    if row[0] != 1 or row[1] != 1 or row[2] != 1 or row[3] != 0:
        for which in sorted(range(4), key=lambda n: row[4 + n]):
            image = _JITTER[which](image, row[which])
    grey, sigma, threshold, taps = row[8:12]
    if grey > 0:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if sigma > 0:
        # Twice as fast as cv2.GaussianBlur, and its rounding is exact.
        kernel = gaussian(sigma, int(taps))
        image = cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)
    if grey > 0:
        image = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    if threshold < 256:
        image = cv2.LUT(image, _solarised(threshold))
    return image


def brightness(image: Image, factor: float) -> Image:
    """A blend with black."""
    return cv2.convertScaleAbs(image, alpha=factor)


def contrast(image: Image, factor: float) -> Image:
    """A blend with the mean of the grey image."""
    mean = cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
    return cv2.addWeighted(image, factor, image, 0.0, (1 - factor) * mean)


def saturation(image: Image, factor: float) -> Image:
    """A blend with the grey image."""
    return cv2.transform(image, factor * _EYE + (1 - factor) * _LUMA)


def hue(image: Image, shift: float) -> Image:
    """Turns the hue by `shift` turns; hue has 256 steps here."""
    steps = round(shift * 256) % 256
    if steps == 0:
        return image
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(steps)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


_JITTER = (brightness, contrast, saturation, hue)


def gaussian(sigma: float, taps: int = 0) -> Float[np.ndarray, " K"]:
    """The kernel of the blur, `taps` pixels long; 0: cut at 3 sigma."""
    reach = radius(sigma, taps)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return kernel / kernel.sum()


def _solarised(threshold: float) -> UInt8[np.ndarray, " 256"]:
    values = np.arange(256)
    return np.where(values >= threshold, 255 - values, values).astype(np.uint8)
