"""A backbone that names classes: what fine-tuning trains."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from contramask.errors import need_one_of
from contramask.models.backbone import Backbone
from contramask.models.positions import resize_positions, resize_relative
from contramask.models.vit import VisionTransformer
from contramask.types import UserError, fold

Pool = Literal["mean", "cls"]

_SHARED = "bias.relative_position_bias_table"


class Classifier(nn.Module):
    """Images to a score per class: backbone, pooling, one linear layer.

    `mean` is the mean of the last block's patches, un-normed, and then the backbone's last norm
    (MAE's `fc_norm`, BEiT, SimMIM): that norm stands behind the mean here, in front of it in
    pretraining. `cls` is the class token after the norm (DINO, iBOT, DeiT).

    Args:
        backbone: what is read; it is trained too.
        classes: how many.
        pool: how tokens become one vector.

    Raises:
        UserError: for another pooling, fewer than two classes, or a class token that is not there.
    """

    def __init__(self, backbone: Backbone, classes: int, *, pool: Pool = "mean"):
        super().__init__()
        need_one_of(pool, Pool, "fine-tuning: pool", "model.pool")
        if classes < 2:
            raise UserError(
                f"fine-tuning: the labels have {classes} class(es), at least two are needed; see "
                "`cls` in the shards, and data.images.classes"
            )
        if (
            pool == "cls"
            and isinstance(backbone, VisionTransformer)
            and backbone.vit.cls_token is None
        ):
            raise UserError(
                "fine-tuning: pool is 'cls', but this backbone has no class token; set model.pool "
                "to mean"
            )
        self.backbone, self.classes, self.pool = backbone, classes, pool
        self.head = nn.Linear(backbone.spec.dim, classes)

    def features(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """What the head reads."""
        if self.pool == "cls":
            return self.backbone(images).cls
        last = self.backbone.spec.depth - 1
        tokens = self.backbone(images, layers=(last,))
        patches = tokens.layers[last][:, tokens.prefix.shape[1] :]
        return self.backbone.normed(patches.mean(1, keepdim=True))[:, 0]

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C"]:
        return self.head(self.features(images))

    @torch.no_grad()
    def initialise(self, *, std: float, seed: int) -> None:
        """A new head: weights N(0, std), biases 0. With the mean a new norm: weights 1, biases 0.

        The authors truncate at 2, which is 100,000 standard deviations.
        """
        generator = torch.Generator().manual_seed(fold(seed, "head"))
        self.head.weight.normal_(0.0, std, generator=generator)
        self.head.bias.zero_()
        if self.pool == "mean" and isinstance(self.backbone, VisionTransformer):
            for module in self.backbone.vit.norm.modules():
                if isinstance(module, nn.LayerNorm):
                    module.reset_parameters()


def tunable(
    backbone: Backbone, *, size: int, drop_path: float = 0.0, freeze_patch_embed: bool = False
) -> VisionTransformer:
    """The same network made ready for fine-tuning, with its weights; the given one stays as it is.

    Everything is trained, also what was fixed in pretraining: sine-cosine positions (MAE) and the
    patch projection (MoCo v3). Relative positions that blocks shared become one table for each
    block (BEiT, SimMIM). For images of another size positions are resized, once.

    Args:
        backbone: pretrained.
        size: pixels a side of the images.
        drop_path: its rate in the last block, growing from 0 in the first.
        freeze_patch_embed: keep the patch projection as it is.

    Raises:
        UserError: for a backbone that is no `VisionTransformer`, a rate outside [0, 1), or a size
            that is no whole number of patches.
    """
    if not isinstance(backbone, VisionTransformer):
        raise UserError(f"fine-tuning needs a VisionTransformer, this is {type(backbone).__name__}")
    if not 0 <= drop_path < 1:
        raise UserError(
            f"fine-tuning: drop_path is {drop_path}; it is a probability below 1; set "
            "model.drop_path"
        )
    patch = backbone.spec.patch
    if size % patch or size < patch:
        raise UserError(
            f"images of {size} pixels are no whole number of patches of {patch}; set images.size "
            "to a multiple"
        )
    config, relative = backbone.config, backbone.bias is not None
    vit = VisionTransformer(
        **config
        | {
            "img_size": size,
            "positions": "relative_per_block" if relative else "learned",
            "freeze_patch_embed": False,
            "drop_path": "growing",
            "timm": config["timm"] | {"drop_path_rate": drop_path},
        }
    )
    vit.load_state_dict(_resized(backbone, vit))
    vit.requires_grad_(requires_grad=True)
    if freeze_patch_embed:
        vit.vit.patch_embed.requires_grad_(requires_grad=False)
    return vit


def _resized(old: VisionTransformer, new: VisionTransformer) -> dict[str, Any]:
    """The weights of one for the grid of the other; shared relative positions for each block."""
    state = old.state_dict()
    if "vit.pos_embed" in state:
        count = 0 if old.vit.no_embed_class else old.vit.num_prefix_tokens
        method = old.config["interpolation"]
        state["vit.pos_embed"] = resize_positions(
            state["vit.pos_embed"], old.spec.grid, new.spec.grid, count, method
        )
    for name in [name for name in state if name.startswith("bias.")]:
        table = resize_relative(state.pop(name), old.spec.grid, new.spec.grid)
        blocks = range(old.spec.depth) if name == _SHARED else [int(name.split(".")[1])]
        state |= {f"bias.{i}.relative_position_bias_table": table.clone() for i in blocks}
    return state
