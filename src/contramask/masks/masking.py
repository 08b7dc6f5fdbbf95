"""What every mask promises. Masks are named in the configuration, because sharing is by name.

They are functions of the place of each image (`Step`), so the masks of a global batch are the same
however it is spread over ranks and micro-batches.
"""

from abc import ABC, abstractmethod

import torch
from torch import nn

from contramask.types import Mask, Spec, Step, UserError


class Masking(nn.Module, ABC):
    """A way of hiding patches, and what stands in their place (`fill`; None: they are dropped).

    The fill belongs to the mask: a mask token inside the backbone would be a parameter without
    gradient in every run that hides nothing, which stops DDP.
    """

    fill: nn.Parameter | None

    def __init__(self, spec: Spec, *, fill: bool, fill_std: float = 0.02):
        """Make the fill, if there is one.

        Args:
            spec: of the backbone.
            fill: whether a learned token stands in the place of a hidden patch.
            fill_std: standard deviation it is drawn with, clipped at one, as SimMIM and BEiT
                initialise their mask token; 0: it starts at zeros (iBOT, DINOv2).
        """
        super().__init__()
        if fill_std < 0:
            raise UserError(
                f"mask fill_std is {fill_std}; it is the standard deviation that the token of "
                "hidden patches is drawn with, at least 0; set model.masks.NAME.init_args.fill_std"
            )
        self.fill = nn.Parameter(torch.zeros(spec.dim)) if fill else None
        if self.fill is not None and fill_std > 0:
            nn.init.trunc_normal_(self.fill, std=fill_std, a=-fill_std, b=fill_std)

    @abstractmethod
    def sample(
        self, name: str, batch: int, crops: int, step: Step, device: torch.device | str
    ) -> Mask:
        """Draw a mask for `crops` crops of each of `batch` images: crop-major (VB, N)."""


def check_ratio(ratio: float) -> float:
    if not 0 < ratio < 1:
        raise UserError(
            f"mask ratio is {ratio}; it is the hidden fraction of an image, strictly between 0 "
            "and 1; set it at model.masks.NAME.init_args.ratio"
        )
    return ratio
