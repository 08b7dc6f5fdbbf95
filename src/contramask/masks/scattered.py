"""Patches hidden independently of their neighbours, one by one or in square units.

Drawn on the device, for all images at once.
"""

import math
from abc import abstractmethod

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from contramask.masks.masking import Masking, check_ratio
from contramask.types import Mask, Spec, Step, UserError


class _Scattered(Masking):
    """A mask that hides units of a grid by a number for each."""

    units: tuple[int, int]  # rows, columns

    @abstractmethod
    def hide(self, noise: Float[Tensor, "VB units"]) -> Mask:
        """The mask in which the units with the smallest noise stay visible.

        Args:
            noise: a number for each unit, rows first; which of equal ones counts as smaller is not
                said.
        """

    def sample(
        self, name: str, batch: int, crops: int, step: Step, device: torch.device | str
    ) -> Mask:
        total = self.units[0] * self.units[1]
        noise = step.rand(f"mask/{name}", batch, crops, total, device=device)
        return self.hide(noise.transpose(0, 1).flatten(0, 1))


def _all_but_smallest(noise: Float[Tensor, "VB units"], count: int) -> Bool[Tensor, "VB units"]:
    return noise.argsort(-1).argsort(-1) >= count


class RandomMasking(_Scattered):
    """Each patch is hidden independently of its neighbours; every image hides equally many.

    MAE (arXiv:2111.06377): ratio 0.75, dropped; int(N (1 - ratio)) patches stay visible.

    Args:
        spec: of the backbone.
        ratio: hidden fraction of the patches.
        fill: True puts a learned token in the place of a hidden patch, False drops it.
    """

    def __init__(self, spec: Spec, *, ratio: float = 0.75, fill: bool = False):
        super().__init__(spec, fill=fill)
        self.units, self.visible = spec.grid, int(spec.patches * (1 - check_ratio(ratio)))
        if self.visible < 1:
            raise UserError(
                f"mask ratio {ratio} hides all {spec.patches} patches of an image; at least one "
                "must stay visible; lower model.masks.NAME.init_args.ratio or the patch size"
            )

    def hide(self, noise: Float[Tensor, "VB units"]) -> Mask:
        hidden = _all_but_smallest(noise, self.visible)
        return Mask(hidden, hidden[:, None], self.visible)


class UnitMasking(_Scattered):
    """Square units of several patches are hidden together.

    SimMIM (arXiv:2111.09886): units of 32 pixels on a grid of 7 x 7, ceil(0.6 x 49) = 30 hidden.

    Args:
        spec: of the backbone.
        ratio: hidden fraction of the units; their number is rounded up.
        unit: side of a unit in pixels, a multiple of the patch.
        fill: True puts a learned token in the place of a hidden patch, False drops it.
    """

    def __init__(self, spec: Spec, *, ratio: float = 0.6, unit: int = 32, fill: bool = True):
        super().__init__(spec, fill=fill)
        self.scale, rest = divmod(unit, spec.patch)
        rows, columns = spec.grid
        if rest or not self.scale or rows % self.scale or columns % self.scale:
            raise UserError(
                f"mask unit is {unit} pixels; it must be a multiple of the patch ({spec.patch}) "
                f"that divides the image ({rows * spec.patch} x {columns * spec.patch}); "
                "set model.masks.NAME.init_args.unit"
            )
        self.units = (rows // self.scale, columns // self.scale)
        total = self.units[0] * self.units[1]
        self.visible = total - math.ceil(check_ratio(ratio) * total)
        if self.visible < 1:
            raise UserError(
                f"mask ratio {ratio} hides all {total} units of an image; at least one must stay "
                "visible; lower model.masks.NAME.init_args.ratio or unit"
            )

    def hide(self, noise: Float[Tensor, "VB units"]) -> Mask:
        square = _all_but_smallest(noise, self.visible).unflatten(1, self.units)
        fine = square.repeat_interleave(self.scale, 1).repeat_interleave(self.scale, 2)
        hidden = fine.flatten(1)
        return Mask(hidden, hidden[:, None], self.visible * self.scale**2)
