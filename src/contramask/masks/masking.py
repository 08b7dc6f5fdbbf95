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

    def __init__(self, spec: Spec, *, fill: bool):
        super().__init__()
        # Clipped at one standard deviation, as SimMIM and BEiT initialise their mask token.
        self.fill = nn.Parameter(torch.empty(spec.dim)) if fill else None
        if self.fill is not None:
            nn.init.trunc_normal_(self.fill, std=0.02, a=-0.02, b=0.02)

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
