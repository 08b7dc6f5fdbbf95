"""A tokenizer anyone can fit: the nearest of a codebook of patches."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from contramask.functional.kmeans import nearest
from contramask.functional.patches import patchify
from contramask.models.tokenizers.tokenizer import Tokenizer
from contramask.types import UserError


class PatchTokenizer(Tokenizer):
    """Words are the centres of k-means over pixels of patches (`contramask tokenizer fit`).

    Args:
        codebook: the words, each a patch in [0, 1] in the order of `functional.patches.patchify`.
    """

    codebook: Tensor

    def __init__(self, codebook: Float[Tensor, "V PPC"]):
        super().__init__()
        self.vocabulary = len(codebook)
        self.stride = round((codebook.shape[1] / 3) ** 0.5)
        if 3 * self.stride**2 != codebook.shape[1]:
            raise UserError(
                f"the words of a codebook have {codebook.shape[1]} numbers; a patch of 3 channels "
                "has 3 p^2; fit the codebook with contramask tokenizer fit"
            )
        self.register_buffer("codebook", codebook)

    def forward(self, image: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B N"]:
        patches = patchify(image.to(self.codebook.dtype), self.stride)  # (B, N, 3pp)
        return nearest(patches.flatten(0, 1), self.codebook).unflatten(0, patches.shape[:2])

    def draw(self, ids: Int[Tensor, "B N"]) -> Float[Tensor, "B N PPC"]:
        """The patches that words stand for."""
        return self.codebook[ids]


def patches_of(image: Float[Tensor, "B 3 H W"], patch: int) -> Float[Tensor, "R PPC"]:
    """The patches of images in [0, 1] as rows, as a codebook is fitted to."""
    return torch.flatten(patchify(image, patch), 0, 1)
