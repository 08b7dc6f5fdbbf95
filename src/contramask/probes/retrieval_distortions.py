"""Strong distortions of 8-bit images, after the copies that Copydays and DISC21 are made of.

Copydays (Douze et al., 2009) crops, compresses, and prints, scans, blurs and paints; DISC21
(arXiv:2106.09672) adds colours, rotations and overlaid text. Each copy here is made by a few of
them one after the other, all drawn as a function of (seed, key of the image, number of the copy).
"""

import io
from collections.abc import Callable

import torch
import torchvision.transforms.v2.functional as TF
from jaxtyping import Bool, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode

from contramask.types import fold

Distortion = Callable[[Tensor, torch.Generator], Tensor]


def distort(
    image: UInt8[Tensor, "3 H W"], *, key: str, copy: int, seed: int = 0, steps: int = 2
) -> tuple[UInt8[Tensor, "3 H W"], tuple[str, ...]]:
    """One distorted copy, and the names of its distortions in the order they were applied.

    Args:
        image: on the CPU.
        key: its name.
        copy: the number of the copy.
        seed: of all draws.
        steps: how many different ones of `DISTORTIONS`.
    """
    generator = torch.Generator().manual_seed(fold(seed, key, "copy", copy))
    names = list(DISTORTIONS)
    chosen = torch.randperm(len(names), generator=generator)[:steps].tolist()
    for i in chosen:
        image = DISTORTIONS[names[i]](image, generator)
    return image, tuple(names[i] for i in chosen)


def _between(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _below(number: int, generator: torch.Generator) -> int:
    return int(torch.randint(number, (), generator=generator))


def _crop(image: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the area, anywhere, in the proportions of the image, enlarged to its size."""
    height, width = image.shape[1:]
    rows, columns = (max(1, round(n * 0.5**0.5)) for n in (height, width))
    top = _below(height - rows + 1, generator)
    left = _below(width - columns + 1, generator)
    return TF.resized_crop(image, top, left, rows, columns, [height, width], antialias=True)


def _jpeg(image: Tensor, generator: torch.Generator) -> Tensor:
    """Quality 10 to 30."""
    file = io.BytesIO()  # torchvision's own encoder is deprecated
    TF.to_pil_image(image).save(file, "jpeg", quality=10 + _below(21, generator))
    return TF.pil_to_tensor(Image.open(file))


def _blur(image: Tensor, generator: torch.Generator) -> Tensor:
    """A Gaussian of 1 to 2 per cent of the shorter side, cut at 3 of them."""
    side = min(image.shape[1:])
    sigma = _between(0.01, 0.02, generator) * side
    reach = min(max(1, round(3 * sigma)), side - 1)
    return TF.gaussian_blur(image, [2 * reach + 1] * 2, [max(sigma, 0.3)] * 2)


def _colour(image: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness times 0.6 to 1.4, saturation times 0.4 to 1.6, hue by up to 0.1 of the circle."""
    image = TF.adjust_brightness(image, _between(0.6, 1.4, generator))
    image = TF.adjust_saturation(image, _between(0.4, 1.6, generator))
    return TF.adjust_hue(image, _between(-0.1, 0.1, generator))


def _rotate(image: Tensor, generator: torch.Generator) -> Tensor:
    """By 10 to 30 degrees to either side; the corners become black."""
    angle = _between(10.0, 30.0, generator) * (1 if _below(2, generator) else -1)
    return TF.rotate(image, angle, interpolation=InterpolationMode.BILINEAR)


def _overlay(image: Tensor, generator: torch.Generator) -> Tensor:
    """A block like a caption, dark on light or light on dark: 25 to 40 % x 60 to 90 % of the sides.

    Four lines of twelve signs, each a random pattern of 3 x 3 cells.
    """
    height, width = image.shape[1:]
    rows = max(1, round(height * _between(0.25, 0.4, generator)))
    columns = max(1, round(width * _between(0.6, 0.9, generator)))
    top = _below(height - rows + 1, generator)
    left = _below(width - columns + 1, generator)
    ink = _signs(4, 12, generator)[None].to(torch.uint8)
    ink = TF.resize(ink, [rows, columns], interpolation=InterpolationMode.NEAREST)
    colours = (20, 235) if _below(2, generator) else (235, 20)
    block = torch.where(ink.bool(), *(torch.tensor(c, dtype=torch.uint8) for c in colours))
    image = image.clone()
    image[:, top : top + rows, left : left + columns] = block
    return image


def _signs(lines: int, signs: int, generator: torch.Generator) -> Bool[Tensor, "h w"]:
    ink = torch.rand((4 * lines + 1, 4 * signs + 1), generator=generator) < 0.5
    ink[::4], ink[:, ::4] = False, False  # between lines, between signs
    return ink


def _contrast(image: Tensor, generator: torch.Generator) -> Tensor:
    """Times 0.3 to 0.6, or times 1.7 to 2.5."""
    low, high = (0.3, 0.6) if _below(2, generator) else (1.7, 2.5)
    return TF.adjust_contrast(image, _between(low, high, generator))


DISTORTIONS: dict[str, Distortion] = {
    "crop": _crop,
    "jpeg": _jpeg,
    "blur": _blur,
    "colour": _colour,
    "rotate": _rotate,
    "overlay": _overlay,
    "contrast": _contrast,
}
