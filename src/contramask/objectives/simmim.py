"""Predict the pixels of hidden patches from the tokens that stand in for them. Xie et al., 2022.

arXiv:2111.09886: SimMIM.
"""

from jaxtyping import Float
from torch import Tensor, nn

from contramask.functional.patches import blacken, patchify, unpatchify
from contramask.models.heads import BlockReader
from contramask.objectives.objective import Feats, Objective, need_fill
from contramask.types import Batch, Loss, Pass, Spec, Step


class SimMIM(Objective):
    """Mean absolute error of hidden pixels, by one linear layer.

        loss = sum over hidden pixels and channels of |prediction - pixel| / (3 number of them)

    Args:
        spec: of the backbone.
        mask: a mask with a fill.
        view: the group of crops it reconstructs.
        layer: number of the block, from 0, whose tokens it reads, or a fraction of the depth;
            None: the last.
    """

    def __init__(
        self, spec: Spec, *, mask: str, view: str = "mild", layer: int | float | None = None
    ):
        super().__init__()
        self.read = BlockReader(spec, layer)
        self.layer = self.read.block
        self.passes = (Pass(view, mask, layers=self.read.layers),)
        self.spec = spec
        # The official 1 x 1 convolution and pixel shuffle, as the matrix they are; its rows are
        # ordered (row, column, colour) here and (colour, row, column) there.
        self.decoder = nn.Linear(spec.dim, 3 * spec.patch**2)

    def predict(self, patch: Float[Tensor, "B N D"]) -> Float[Tensor, "B N PPC"]:
        """Pixels of every patch."""
        return self.decoder(patch).float()

    def forward(self, feats: Feats, batch: Batch, step: Step) -> Loss:
        tokens = self.read(feats[self.passes[0]])
        assert tokens.mask is not None
        need_fill("SimMIM", tokens, self.passes[0])
        image = batch["views"][self.passes[0].view].flatten(0, 1)  # (VB, 3, H, W)
        pixels = patchify(image, self.spec.patch)  # (VB, N, 3pp)
        error = (self.predict(tokens.patch) - pixels).abs().mean(-1)  # (VB, N)
        hidden = tokens.mask.hidden
        # The official denominator: hidden pixels + 1e-5, then the 3 channels.
        count = hidden.sum() * self.spec.patch**2
        return Loss((error * hidden).sum() * self.spec.patch**2 / (count + 1e-5), {})

    def picture(self, feats: Feats, batch: Batch, step: Step) -> dict[str, Tensor]:
        tokens = self.read(feats[self.passes[0]])
        assert tokens.mask is not None
        image = batch["views"][self.passes[0].view].flatten(0, 1)
        patches, patch, grid = patchify(image, self.spec.patch), self.spec.patch, self.spec.grid
        hidden = tokens.mask.hidden[..., None]
        return {
            "image": image,
            "masked": blacken(image, tokens.mask.hidden, patch),
            "reconstruction": unpatchify(
                self.predict(tokens.patch).where(hidden, patches), patch, grid
            ),
        }
