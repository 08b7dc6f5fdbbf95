"""What every tokenizer promises: images in, a word of a vocabulary for each place of a grid out."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


class Tokenizer(nn.Module, ABC):
    """A fixed map from images to words. It has no gradient.

    Attributes:
        vocabulary: how many words there are; ids are 0 .. vocabulary - 1.
        stride: pixels a side that one word stands for.
    """

    vocabulary: int
    stride: int

    @abstractmethod
    def forward(self, image: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B N"]:
        """The words of an image in [0, 1], H and W multiples of the stride, in row-major order."""

    def words(self, image: Float[Tensor, "B 3 H W"], grid: tuple[int, int]) -> Int[Tensor, "B N"]:
        """One word for each place of a grid of (rows, columns), whatever size the image has.

        The image is resized to `stride` pixels a place: bicubic, antialiased, cut to [0, 1].
        Everything is computed in float32 without autocast, which would choose other words.
        """
        size = (grid[0] * self.stride, grid[1] * self.stride)
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            wide = image.to(torch.promote_types(image.dtype, torch.float32))
            if wide.shape[2:] != size:
                wide = F.interpolate(wide, size=size, mode="bicubic", antialias=True)
            return self(wide.clamp(0, 1))


class Beside(nn.Module):
    """A tokenizer that goes where its owner goes and is otherwise none of its parts.

    It is frozen and lies in a file of its own: it need not be in every checkpoint, in the lists of
    the optimiser, or in what DDP sends around.
    """

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self._kept = (tokenizer.eval().requires_grad_(False),)  # in a tuple: not registered

    @property
    def module(self) -> Tokenizer:
        """The tokenizer."""
        return self._kept[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Beside":
        """Called by `to`, `double`, `cuda` and their like on the owner."""
        self.module._apply(fn, recurse)
        return self
