"""Images made worse on purpose, each way named by a word, for probes of robustness.

Every random draw is a function of (seed, key of the image, word): the same image is degraded alike
in whatever batch, on whatever rank.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torchvision.transforms.v2.functional as TF
from jaxtyping import Float
from torch import Tensor

from contramask.functional.frequencies import high_pass, low_pass, within_band
from contramask.types import UserError, fold

Kind = Literal["clean", "noise", "blur", "freq", "lowpass", "highpass", "shuffle"]

EPS = 0.7  # of band noise, in units of the normalised image (Park et al., in an issue)
_NUMBER = r"(\d+(?:\.\d+)?)"
_WORD = re.compile(
    rf"(clean)|(noise|blur|lowpass|highpass|shuffle){_NUMBER}|(freq){_NUMBER}(?:eps{_NUMBER})?"
)
GRAMMAR = (
    "clean, noise20 (sigma / 255), blur4 (sigma, pixels), freq0.5 or freq0.5eps0.7 (band around "
    "0.5 pi), lowpass8 and highpass8 (cycles per image), shuffle4 (a grid of 4 x 4 patches)"
)


@dataclass(frozen=True)
class Degradation:
    """One way to make an image worse.

    Attributes:
        kind: which.
        strength: of `noise` the standard deviation, of 255 levels of grey; of `blur` that of the
            Gaussian, in pixels; of `freq` the middle of the band, in pi per pixel, in (0, 1]; of
            `lowpass` and `highpass` the radius in cycles per image; of `shuffle` the patches along
            a side.
        eps: of `freq`: the noise before the band is cut out is +-eps, in units of the normalised
            image.

    Raises:
        UserError: for a strength that means nothing.
    """

    kind: Kind
    strength: float = 0.0
    eps: float = 0.0

    def __post_init__(self) -> None:
        allowed = {
            "freq": (0 < self.strength <= 1 and self.eps > 0, "f in (0, 1] and eps above 0"),
            "shuffle": (self.strength >= 2 and self.strength % 1 == 0, "a whole number from 2 on"),
        }
        fits, what = allowed.get(self.kind, (self.strength > 0, "a strength above 0"))
        if self.kind != "clean" and not fits:
            raise UserError(f"degradations: {str(self)!r} needs {what}; correct --degradations")

    @classmethod
    def parse(cls, word: str) -> "Degradation":
        """What a word such as `noise20` means. Raises `UserError` for one that means nothing."""
        found = _WORD.fullmatch(word)
        if found is None:
            raise UserError(f"degradations: {word!r} is none; there are {GRAMMAR}")
        clean, kind, strength, band, f, eps = found.groups()
        if band:
            return cls("freq", float(f), float(eps or EPS))
        return cls("clean") if clean else cls(cast("Kind", kind), float(strength))

    def __str__(self) -> str:
        if self.kind == "clean":
            return "clean"
        eps = f"eps{self.eps:g}" if self.kind == "freq" and self.eps != EPS else ""
        return f"{self.kind}{self.strength:g}{eps}"

    def about(self) -> str:
        """In words, for a protocol."""
        x = f"{self.strength:g}"
        return {
            "clean": "the clean view",
            "noise": f"Gaussian noise of sigma {x}/255 on every pixel and channel, clipped to "
            "[0, 1]",
            "blur": f"Gaussian blur of sigma {x} pixels, cut at 3 sigma, reflected at the border",
            "freq": f"+-{self.eps:g} in units of the normalised image, restricted to the square "
            f"annulus {x} pi +- 0.2 rad per pixel (Park et al.), added and not clipped",
            "lowpass": f"ideal filter up to {x} cycles per image, the mean kept, not clipped",
            "highpass": f"ideal filter above {x} cycles per image, the mean kept, not clipped",
            "shuffle": f"a grid of {x} x {x} patches in a random order (Naseer et al.)",
        }[self.kind]

    def check(self, height: int, width: int) -> None:
        """Raise `UserError` if it means nothing for images of that size."""
        highest = math.hypot(height // 2, width // 2)
        if self.kind == "shuffle" and (height % int(self.strength) or width % int(self.strength)):
            raise UserError(
                f"degradations: {self} needs sides that {self.strength:g} divides; images have "
                f"{height} x {width} pixels; correct --degradations or --images.size"
            )
        if self.kind in ("lowpass", "highpass") and self.strength >= highest:
            raise UserError(
                f"degradations: {self} is above every frequency of images of {height} x {width} "
                f"pixels, which end at {highest:.3g} cycles per image; correct --degradations"
            )

    def __call__(
        self,
        images: Float[Tensor, "B 3 H W"],
        keys: Sequence[str],
        *,
        seed: int = 0,
        std: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> Float[Tensor, "B 3 H W"]:
        """The images, degraded.

        Args:
            images: in [0, 1]. Noise is clipped to that; blurs and shuffles stay in it; band noise
                and filters may leave it.
            keys: the names of the images: with seed and word all that draws depend on.
            seed: of the draws.
            std: what the channels are divided by when they are normalised: the unit of `eps`.

        Raises:
            UserError: see `check`.
        """
        self.check(*images.shape[2:])
        draws = _Draws(seed, str(self), keys, images)
        if self.kind == "noise":
            return (images + self.strength / 255 * draws.normal()).clamp(0, 1)
        if self.kind == "blur":
            return blur(images, self.strength)
        if self.kind == "freq":
            noise = within_band(self.eps * draws.normal().sign(), self.strength * math.pi)
            return images + noise * images.new_tensor(std)[:, None, None]
        if self.kind == "lowpass":
            return low_pass(images, self.strength)
        if self.kind == "highpass":
            return high_pass(images, self.strength)
        if self.kind == "shuffle":
            return shuffle_patches(images, draws.orders(int(self.strength) ** 2))
        return images

    def of_normalised(
        self,
        images: Float[Tensor, "B 3 H W"],
        keys: Sequence[str],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int = 0,
    ) -> Float[Tensor, "B 3 H W"]:
        """The same for images that are normalised, before and after; `clean` returns them."""
        if self.kind == "clean":
            return images
        shift, scale = (images.new_tensor(v)[:, None, None] for v in (mean, std))
        return (self(images * scale + shift, keys, seed=seed, std=std) - shift) / scale


class _Draws:
    """Random numbers of each image, drawn on the host, so that all devices see the same."""

    def __init__(self, seed: int, word: str, keys: Sequence[str], images: Tensor) -> None:
        assert len(keys) == len(images), f"{len(keys)} keys of {len(images)} images"
        self.seed, self.word, self.keys, self.images = seed, word, keys, images

    def normal(self) -> Float[Tensor, "B 3 H W"]:
        shape = self.images.shape[1:]
        rows = [torch.randn(shape, generator=g) for g in self._generators()]
        return self._placed(rows, self.images.new_empty((0, *shape)))

    def orders(self, count: int) -> Tensor:
        """A permutation of `count` places for each image."""
        rows = [torch.randperm(count, generator=g) for g in self._generators()]
        return self._placed(rows, torch.empty((0, count), dtype=torch.long))

    def _placed(self, rows: list[Tensor], nothing: Tensor) -> Tensor:
        return (torch.stack(rows) if rows else nothing).to(self.images.device)

    def _generators(self) -> list[torch.Generator]:
        places = [fold(self.seed, key, self.word) for key in self.keys]
        return [torch.Generator().manual_seed(place) for place in places]


def blur(images: Float[Tensor, "B 3 H W"], sigma: float) -> Float[Tensor, "B 3 H W"]:
    """A Gaussian of `sigma` pixels, cut at 3 sigma (or at the image's size), reflected beyond it.

    Rows, then columns: the kernel is a product, and a square one takes 25 times longer at sigma 8.
    """
    height, width = images.shape[2:]
    taps = [2 * min(math.ceil(3 * sigma), n - 1) + 1 for n in (width, height)]
    along = TF.gaussian_blur(images, [taps[0], 1], [sigma, sigma])
    return TF.gaussian_blur(along, [1, taps[1]], [sigma, sigma])


def shuffle_patches(images: Float[Tensor, "B C H W"], order: Tensor) -> Float[Tensor, "B C H W"]:
    """The patches of a square grid in another order (Naseer et al., 2021, arXiv:2105.10497).

    Args:
        images: of sides that the grid divides.
        order: (B, g * g), for each place in row-major order the patch that comes there.
    """
    grid = math.isqrt(order.shape[1])
    height, width = (n // grid for n in images.shape[2:])
    patches = images.unflatten(3, (grid, width)).unflatten(2, (grid, height))
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (B, g * g, C, h, w)
    patches = patches.take_along_dim(order[:, :, None, None, None], 1).unflatten(1, (grid, grid))
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(images.shape)


def sweep(size: int) -> list[str]:
    """The words of a whole sweep for images of `size` pixels.

    Noise of sigma 10 to 40 and blurs of 2 to 8 pixels (Vanyan et al., for images of 224 pixels:
    blurs scale with the size), bands over (0, pi] (Park et al.), filters at 4 to 32 cycles and
    grids of 2, 4 and 8, as far as the size allows.
    """
    words = ["clean", *(f"noise{n}" for n in (10, 20, 30, 40))]
    words += [f"blur{n * size / 224:.3g}" for n in (2, 4, 6, 8)]
    words += [f"freq{n / 10:g}" for n in range(1, 11)]
    radii = [r for r in (4, 8, 16, 32) if r < size / 2]
    words += [f"{kind}{r}" for kind in ("lowpass", "highpass") for r in radii]
    return [*words, *(f"shuffle{g}" for g in (2, 4, 8) if size % g == 0)]
