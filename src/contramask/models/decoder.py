"""The decoder of masked autoencoders: from visible tokens to something for every patch."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from contramask.functional.patches import sincos
from contramask.models.vit import transformer_blocks
from contramask.types import Spec, Tokens, UserError


class TransformerDecoder(nn.Module):
    """A small ViT over visible tokens and mask tokens (MAE, arXiv:2111.06377, section 3).

    Args:
        spec: of the backbone.
        out: numbers predicted per patch.
        dim: width of the decoder.
        depth: its blocks.
        heads: its attention heads.
    """

    def __init__(self, spec: Spec, out: int, *, dim: int = 512, depth: int = 8, heads: int = 16):
        super().__init__()
        self.embed = nn.Linear(spec.dim, dim)
        self.mask_token = nn.Parameter(torch.empty(dim))
        self.register_buffer("positions", sincos(dim, spec.grid), persistent=False)
        self.blocks = transformer_blocks(dim, depth, heads)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.out = nn.Linear(dim, out)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tokens) -> Float[Tensor, "B N O"]:
        """Predict every patch, in grid order, from the visible ones."""
        if tokens.mask is None or tokens.patch.shape[1] != tokens.mask.visible:
            raise UserError(
                "the decoder puts its own token where patches were dropped, and this pass drops "
                "none; give the objective a mask and set model.masks.NAME.init_args.fill: false"
            )
        x = self.embed(torch.cat([tokens.prefix, tokens.patch], 1))
        prefix, seen = x.split([tokens.prefix.shape[1], tokens.patch.shape[1]], 1)
        where = tokens.mask.kept()[..., None].expand(-1, -1, seen.shape[2])
        empty = self.mask_token.to(seen.dtype).expand(len(seen), tokens.mask.hidden.shape[1], -1)
        # Positions are float32, and so, under autocast, is the sum that runs through the blocks.
        patches = empty.scatter(1, where, seen) + self.get_buffer("positions")
        x = self.norm(self.blocks(torch.cat([prefix, patches], 1)))
        return self.out(x[:, prefix.shape[1] :])
