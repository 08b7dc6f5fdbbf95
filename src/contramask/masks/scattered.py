"""Patches hidden independently of their neighbours, one by one or in square units.

Drawn on the device, for all images at once.
"""

import math

import torch
from jaxtyping import Bool
from torch import Tensor

from contramask.masks.masking import Masking, check_ratio
from contramask.types import Mask, Spec, Step, UserError


def _hide_largest(
    count: int,
    shape: tuple[int, int],
    name: str,
    batch: int,
    crops: int,
    step: Step,
    device: torch.device | str,
) -> Bool[Tensor, "VB N"]:
    """Hide all but `count` units of a grid: those with the largest noise. Ties do not matter."""
    n = shape[0] * shape[1]
    noise = step.rand(f"mask/{name}", batch, crops, n, device=device)
    ranks = noise.argsort(-1).argsort(-1)
    return (ranks >= count).transpose(0, 1).flatten(0, 1)


class RandomMasking(Masking):
    """Each patch is hidden independently of its neighbours; every image hides equally many.

    MAE (arXiv:2111.06377): ratio 0.75, dropped; int(N (1 - ratio)) patches stay visible.

    Args:
        spec: of the backbone.
        ratio: hidden fraction of the patches.
        fill: True puts a learned token in the place of a hidden patch, False drops it.
    """

    def __init__(self, spec: Spec, *, ratio: float = 0.75, fill: bool = False):
        super().__init__(spec, fill=fill)
        self.grid, self.visible = spec.grid, int(spec.patches * (1 - check_ratio(ratio)))
        if self.visible < 1:
            raise UserError(
                f"mask ratio {ratio} hides all {spec.patches} patches of an image; at least one "
                "must stay visible; lower model.masks.NAME.init_args.ratio or the patch size"
            )

    def sample(
        self, name: str, batch: int, crops: int, step: Step, device: torch.device | str
    ) -> Mask:
        hidden = _hide_largest(self.visible, self.grid, name, batch, crops, step, device)
        return Mask(hidden, hidden[:, None], self.visible)


class UnitMasking(Masking):
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

    def sample(
        self, name: str, batch: int, crops: int, step: Step, device: torch.device | str
    ) -> Mask:
        coarse = _hide_largest(self.visible, self.units, name, batch, crops, step, device)
        square = coarse.unflatten(1, self.units)
        fine = square.repeat_interleave(self.scale, 1).repeat_interleave(self.scale, 2)
        hidden = fine.flatten(1)
        return Mask(hidden, hidden[:, None], self.visible * self.scale**2)
