"""Images by spatial frequency: noise within a band, and ideal low- and high-pass filters.

Frequencies are whole cycles per image along each axis, k = -n/2 .. n/2; in radians per pixel they
are 2 pi k / n, so pi is the highest.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

HALF_WIDTH = 0.2  # of a band, radians per pixel (Park et al.)


def band_mask(
    height: int, width: int, f: float, half_width: float = HALF_WIDTH
) -> Float[Tensor, "H W"]:
    """What a noise of frequency f keeps of each entry of the FFT plane: 1, 1/2 or 0.

    The square annulus of Park et al., 2022 (arXiv:2202.06709) and 2023 (arXiv:2305.00729), as
    their code cuts it: a square of -m .. m - 1 with m = int((f + half_width) n / 2 pi), without the
    one of f - half_width. Such squares are not symmetric, so their inverse transform is complex,
    and they take its real part: frequencies that only one of k and -k keeps are halved. That is
    written into the mask, which is symmetric.

    Args:
        height: of the images, pixels.
        width: likewise; the sides of the squares are taken of each.
        f: the middle of the band, radians per pixel, in (0, pi].
        half_width: of the band, radians per pixel.
    """
    mask = _square(height, width, f + half_width) - _square(height, width, f - half_width)
    opposite = mask.flip(0, 1).roll((1, 1), (0, 1))  # entry k holds what -k had
    return (mask + opposite) / 2


def within_band(
    noise: Float[Tensor, "*B H W"], f: float, half_width: float = HALF_WIDTH
) -> Float[Tensor, "*B H W"]:
    """The part of a noise that lies in the band around f; see `band_mask`. Nothing is rescaled."""
    height, width = noise.shape[-2:]
    return _filtered(noise, band_mask(height, width, f, half_width))


def low_pass(images: Float[Tensor, "*B H W"], radius: float) -> Float[Tensor, "*B H W"]:
    """Frequencies up to `radius` cycles per image, the mean included; an ideal (sharp) filter."""
    height, width = images.shape[-2:]
    return _filtered(images, _disc(height, width, radius))


def high_pass(images: Float[Tensor, "*B H W"], radius: float) -> Float[Tensor, "*B H W"]:
    """Frequencies above `radius` cycles per image, and the mean of each channel.

    Low-pass and high-pass of one radius add up to the image and its mean.
    """
    return images - low_pass(images, radius) + images.mean((-2, -1), keepdim=True)


def _square(height: int, width: int, reach: float) -> Float[Tensor, "H W"]:
    rows, columns = (_reached(n, reach) for n in (height, width))
    return (rows[:, None] & columns).float()


def _reached(n: int, reach: float) -> Tensor:
    most = max(0, int(reach * n / (2 * math.pi)))
    k = _cycles(n)
    return (k >= -most) & (k < most) if 2 * most < n else torch.ones(n, dtype=torch.bool)


def _disc(height: int, width: int, radius: float) -> Float[Tensor, "H W"]:
    return (_cycles(height)[:, None] ** 2 + _cycles(width) ** 2 <= radius**2).float()


def _cycles(n: int) -> Float[Tensor, " n"]:
    """The frequency of each entry of an FFT of n pixels."""
    return torch.fft.fftfreq(n, 1 / n)


def _filtered(x: Tensor, mask: Tensor) -> Tensor:
    half = mask[:, : mask.shape[1] // 2 + 1].to(x.device)  # real images: the rest mirrors it
    return torch.fft.irfft2(torch.fft.rfft2(x) * half, s=x.shape[-2:])
