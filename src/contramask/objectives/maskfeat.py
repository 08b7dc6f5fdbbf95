"""Predict the oriented gradients of hidden patches. Wei et al., 2022: MaskFeat.

arXiv:2112.09133, section 3, with histograms of oriented gradients as features.
"""

from jaxtyping import Float
from torch import Tensor, nn

from contramask.functional.hog import check_sizes, hog_of_patches
from contramask.functional.patches import blacken
from contramask.objectives.objective import Feats, Objective, need_fill
from contramask.types import Batch, Loss, Pass, Spec, Step, UserError


class MaskFeat(Objective):
    """Mean squared error of the histograms of hidden patches, by one linear layer.

        loss = sum over hidden patches of mean_k (prediction_k - hog_k)^2 / max(number of them, 1)

    Args:
        spec: of the backbone.
        mask: a mask with a fill.
        view: the group of crops it looks at.
        cell: side of a cell in pixels, which divides the patch.
        bins: directions of a histogram.
        window: side in pixels of the Gaussian windows that weight gradients; it divides the image.
            None: all weigh the same.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        mask: str,
        view: str = "mild",
        cell: int = 8,
        bins: int = 9,
        window: int | None = 16,
    ):
        super().__init__()
        self.passes = (Pass(view, mask),)
        self.spec, self.cell, self.bins, self.window = spec, cell, bins, window
        if cell < 1 or spec.patch % cell:
            raise UserError(
                f"MaskFeat: cell is {cell} pixels and the patch {spec.patch}; a patch is a whole "
                "number of cells; set model.objectives.NAME.init_args.cell"
            )
        size = (spec.grid[0] * spec.patch, spec.grid[1] * spec.patch)
        check_sizes(size, cell=cell, window=window)
        self.decoder = nn.Linear(spec.dim, 3 * bins * (spec.patch // cell) ** 2)
        nn.init.trunc_normal_(self.decoder.weight, std=0.02)
        nn.init.zeros_(self.decoder.bias)

    def target(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N Z"]:
        """The histograms of every patch: channel, bin, row and column of the cell."""
        return hog_of_patches(
            image, self.spec.patch, bins=self.bins, cell=self.cell, window=self.window
        )

    def forward(self, feats: Feats, batch: Batch, step: Step) -> Loss:
        tokens = feats[self.passes[0]]
        assert tokens.mask is not None
        need_fill("MaskFeat", tokens, self.passes[0])
        image = batch["views"][self.passes[0].view].flatten(0, 1)  # (VB, 3, H, W)
        prediction = self.decoder(tokens.patch).float()  # (VB, N, Z)
        error = (prediction - self.target(image)).square().mean(-1)  # (VB, N)
        hidden = tokens.mask.hidden
        return Loss((error * hidden).sum() / hidden.sum().clamp(min=1), {})

    def picture(self, feats: Feats, batch: Batch, step: Step) -> dict[str, Tensor]:
        tokens = feats[self.passes[0]]
        assert tokens.mask is not None
        image = batch["views"][self.passes[0].view].flatten(0, 1)
        return {"image": image, "masked": blacken(image, tokens.mask.hidden, self.spec.patch)}
