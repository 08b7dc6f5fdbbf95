"""What fine-tuning does to images and labels: the settings."""

from dataclasses import dataclass
from typing import Literal

from contramask.data.geometry import Interpolation
from contramask.data.photometric import Photometric
from contramask.errors import UserError, need_one_of

Mode = Literal["batch", "pair", "elem"]
Noise = Literal["const", "rand", "pixel"]


@dataclass(frozen=True)
class Augment:
    """The augmentation of fine-tuning; the defaults are those of MAE, BEiT and DeiT.

    Attributes:
        scale: range of the crop's area, as a fraction of the image's.
        ratio: range of width / height of the crop.
        interpolation: of the crop's resize, and of RandAugment's rotations and shears.
        flip: probability of mirroring left to right.
        randaugment: timm's name of a RandAugment (arXiv:1909.13719), such as
            `rand-m9-mstd0.5-inc1`; None: none.
        photometric: a change of colours, where there is no RandAugment; None: none.
        erasing: probability that a rectangle of an image is erased (arXiv:1708.04896).
        erasing_mode: by what: noise for each `pixel`, one `rand` colour, or the mean (`const`).
        erasing_count: rectangles, at most.
        mixup: alpha of mixup (arXiv:1710.09412); 0: none.
        cutmix: alpha of cutmix (arXiv:1905.04899); 0: none.
        switch: probability of cutmix where both are on.
        mix: probability that a batch is mixed at all.
        mode: one draw for the whole micro-`batch`, for each `pair` of images or each image, `elem`.
        smoothing: label smoothing: this much of the target is spread over all classes.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bicubic"
    flip: float = 0.5
    randaugment: str | None = "rand-m9-mstd0.5-inc1"
    photometric: Photometric | None = None
    erasing: float = 0.25
    erasing_mode: Noise = "pixel"
    erasing_count: int = 1
    mixup: float = 0.8
    cutmix: float = 1.0
    switch: float = 0.5
    mix: float = 1.0
    mode: Mode = "batch"
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        need_one_of(self.mode, Mode, "augment: mode", "data.augment.mode")
        need_one_of(self.erasing_mode, Noise, "augment: erasing_mode", "data.augment.erasing_mode")
        for name in ("flip", "erasing", "switch", "mix", "smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise _refusal(name, getattr(self, name), "a number in [0, 1]")
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise _refusal(name, getattr(self, name), "0 (none) or above")
        if self.erasing_count < 1:
            raise _refusal("erasing_count", self.erasing_count, "1 or more")
        if self.randaugment and self.photometric:
            raise UserError(
                "data.augment has both randaugment and photometric; colours are changed by one of "
                "them (timm leaves out jitter beside RandAugment); set one to null"
            )

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return self.mix > 0 and (self.mixup > 0 or self.cutmix > 0)

    def about(self) -> str:
        """In words, for a protocol."""
        parts = [f"random crop {self.scale[0]:g}-{self.scale[1]:g}, flip {self.flip:g}"]
        parts += [self.randaugment] if self.randaugment else []
        parts += [f"photometric {self.photometric}"] if self.photometric else []
        if self.erasing:
            parts.append(f"erasing {self.erasing:g} ({self.erasing_mode})")
        if self.mixes:
            parts.append(
                f"mixup {self.mixup:g} and cutmix {self.cutmix:g} (switch {self.switch:g}, "
                f"probability {self.mix:g}, by {self.mode})"
            )
        return ", ".join([*parts, f"label smoothing {self.smoothing:g}"])


def _refusal(name: str, given: object, allowed: str) -> UserError:
    return UserError(f"data.augment.{name} is {given}; it is {allowed}; set data.augment.{name}")
