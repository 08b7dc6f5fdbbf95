"""The predictor of I-JEPA: from the tokens of a context to those of blocks elsewhere."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from contramask.functional.patches import sincos
from contramask.models.vit import transformer_blocks
from contramask.types import Spec, Tokens, UserError


class Predictor(nn.Module):
    """A narrow ViT over context tokens and mask tokens (I-JEPA, arXiv:2301.08243, section 3).

    Every target block is predicted apart: its mask tokens see the context and each other.

    Args:
        spec: of the backbone.
        dim: width of the predictor.
        depth: its blocks.
        heads: its attention heads; as many as the backbone's in the authors' code.
    """

    def __init__(self, spec: Spec, *, dim: int = 384, depth: int = 12, heads: int = 12):
        super().__init__()
        self.embed = nn.Linear(spec.dim, dim)
        self.mask_token = nn.Parameter(torch.empty(dim))
        self.register_buffer("positions", sincos(dim, spec.grid), persistent=False)
        self.blocks = transformer_blocks(dim, depth, heads)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.out = nn.Linear(dim, spec.dim)
        # The authors divide the last matrices of block l by sqrt(2 l), then draw all of them anew.
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tokens, where: Int[Tensor, "B T M"]) -> Float[Tensor, "B T M D"]:
        """Predict the tokens at `where` (see `places`) from the visible ones.

        Raises:
            UserError: if the pass dropped no patches.
        """
        if tokens.mask is None or tokens.patch.shape[1] != tokens.mask.visible:
            raise UserError(
                "the predictor puts its own token where patches were dropped, and this pass drops "
                "none; give the objective a mask that drops: contramask.masks.MultiblockMasking, "
                "or another and set model.masks.NAME.init_args.fill: false"
            )
        positions = self.get_buffer("positions")  # float32, and so is every sum with them
        x = self.embed(torch.cat([tokens.prefix, tokens.patch], 1))
        prefix, seen = x.split([tokens.prefix.shape[1], tokens.patch.shape[1]], 1)
        context = torch.cat([prefix, seen + positions[tokens.mask.kept()]], 1)  # (B, c, d)
        asked = self.mask_token + positions[where]  # (B, T, M, d)
        context = context[:, None].expand(-1, where.shape[1], -1, -1).to(asked.dtype)
        x = self.norm(self.blocks(torch.cat([context, asked], 2).flatten(0, 1)))
        return self.out(x[:, context.shape[2] :]).unflatten(0, where.shape[:2])


def places(targets: Bool[Tensor, "B T N"]) -> Int[Tensor, "B T M"]:
    """Where the M patches of each target block are, in grid order.

    Raises:
        UserError: if blocks differ in size or are empty: they would be no tensor.
    """
    count = targets.sum(-1)
    fewest, most = torch.stack([count.min(), count.max()]).tolist()  # the device is waited for once
    if fewest != most or not most:
        raise UserError(
            f"target blocks have {fewest} to {most} patches; the predictor takes blocks of one "
            "size; use contramask.masks.MultiblockMasking, or a mask that hides equally many"
        )
    return targets.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :most]
