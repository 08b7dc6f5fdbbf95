"""Reconstruct dropped patches from the visible ones. He et al., 2022: masked autoencoders.

arXiv:2111.06377.
"""

from jaxtyping import Float
from torch import Tensor

from contramask.functional.patches import blacken, patchify, unpatchify
from contramask.models.decoder import TransformerDecoder
from contramask.models.heads import BlockReader
from contramask.objectives.objective import Feats, Objective
from contramask.types import Batch, Loss, Pass, Spec, Step


class MAE(Objective):
    """Mean squared error of hidden patches.

        loss = sum over hidden patches of mean_k (prediction_k - target_k)^2 / number of them

    Args:
        spec: of the backbone.
        mask: a mask that drops patches.
        view: the group of crops it reconstructs.
        dim: width of the decoder.
        depth: its blocks.
        heads: its attention heads.
        normalise: targets have mean 0 and (unbiased) variance 1 within each patch; the authors'
            released models do, their code's default does not.
        layer: number of the block, from 0, whose tokens it reads, or a fraction of the depth;
            None: the last.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        mask: str,
        view: str = "mild",
        dim: int = 512,
        depth: int = 8,
        heads: int = 16,
        normalise: bool = True,
        layer: int | float | None = None,
    ):
        super().__init__()
        self.read = BlockReader(spec, layer)
        self.layer = self.read.block
        self.passes = (Pass(view, mask, layers=self.read.layers),)
        self.spec, self.normalise = spec, normalise
        out = 3 * spec.patch**2
        self.decoder = TransformerDecoder(spec, out, dim=dim, depth=depth, heads=heads)

    def target(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N PPC"]:
        """What the decoder shall predict of every patch."""
        patches = patchify(image, self.spec.patch)
        if not self.normalise:
            return patches
        mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
        return (patches - mean) / (var + 1e-6) ** 0.5

    def forward(self, feats: Feats, batch: Batch, step: Step) -> Loss:
        tokens = self.read(feats[self.passes[0]])
        assert tokens.mask is not None
        image = batch["views"][self.passes[0].view].flatten(0, 1)  # (VB, 3, H, W)
        prediction = self.decoder(tokens).float()  # (VB, N, 3pp)
        error = (prediction - self.target(image)).square().mean(-1)  # (VB, N)
        hidden = tokens.mask.hidden
        return Loss((error * hidden).sum() / hidden.sum(), {})

    def picture(self, feats: Feats, batch: Batch, step: Step) -> dict[str, Tensor]:
        tokens = self.read(feats[self.passes[0]])
        assert tokens.mask is not None
        image = batch["views"][self.passes[0].view].flatten(0, 1)
        patches, patch, grid = patchify(image, self.spec.patch), self.spec.patch, self.spec.grid
        made = self.decoder(tokens).float()
        if self.normalise:  # back to the patch's own mean and deviation, for the eye
            made = made * (patches.var(-1, keepdim=True) + 1e-6) ** 0.5
            made = made + patches.mean(-1, keepdim=True)
        hidden = tokens.mask.hidden[..., None]
        return {
            "image": image,
            "masked": blacken(image, tokens.mask.hidden, patch),
            "reconstruction": unpatchify(made.where(hidden, patches), patch, grid),
        }
