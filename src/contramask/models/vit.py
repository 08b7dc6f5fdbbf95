"""Vision Transformers: timm's modules in, tokens out. The only importer of timm's models."""

import difflib
from typing import Any, Literal

import timm
import torch
from jaxtyping import Float
from timm.layers.drop import DropPath
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn

from contramask.functional.patches import sincos
from contramask.models.backbone import Backbone
from contramask.models.drop_path import DropPaths, set_drop_paths
from contramask.models.initialise import INITIALISE, Init
from contramask.models.positions import Interpolation, RelativeBias, resize_positions
from contramask.models.refused import refuse
from contramask.types import Mask, Spec, Tokens, UserError

Positions = Literal["learned", "sincos", "sincos_rows_first", "relative", "relative_per_block"]


def transformer_blocks(dim: int, depth: int, heads: int, mlp_ratio: float = 4.0) -> nn.Sequential:
    """Plain pre-norm blocks, for decoders and predictors."""
    return nn.Sequential(
        *(Block(dim, heads, mlp_ratio=mlp_ratio, qkv_bias=True) for _ in range(depth))
    )


class VisionTransformer(Backbone):
    """Any timm ViT, with masks, fixed positions and the initialisations of the papers.

    Args:
        name: of the model in timm, e.g. `vit_small_patch16_224`.
        img_size: side of the training crops in pixels, or (height, width).
        patch_size: side of a patch in pixels; None: as the name says.
        positions: `learned`; `sincos`, fixed, column first (MAE); `sincos_rows_first`, fixed, row
            first (MoCo v3: the transpose); `relative`, a learned bias of the attention shared by
            all blocks and no absolute positions (SimMIM, BEiT); `relative_per_block`, one bias
            for each block (fine-tuned BEiT).
        interpolation: of absolute positions, for crops of other sizes; see `resize_positions`.
        init: initialisation of the weights: timm's own or an official code's.
        freeze_patch_embed: keep the random patch projection fixed (MoCo v3, arXiv:2104.02057).
        drop_path: of the rate `timm.drop_path_rate`: `growing` from 0 to it over the blocks (timm);
            `uniform`, it in every block; `subset`, in every block too, and exactly so many samples
            of a batch are left out (DINOv2 above 0.1).
        timm: further arguments of timm's model by its own names: `embed_dim`, `depth`,
            `num_heads`, `reg_tokens`, `init_values` (LayerScale), `drop_path_rate` ...

    Raises:
        UserError: for a name, an argument or a size that timm's ViTs do not have.
    """

    def __init__(
        self,
        name: str = "vit_small_patch16_224",
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | None = None,
        positions: Positions = "learned",
        interpolation: Interpolation = "antialias",
        init: Init = "timm",
        freeze_patch_embed: bool = False,
        drop_path: DropPaths = "growing",
        timm: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.config = {
            "name": name,
            "img_size": img_size,
            "patch_size": patch_size,
            "positions": positions,
            "interpolation": interpolation,
            "init": init,
            "freeze_patch_embed": freeze_patch_embed,
            "drop_path": drop_path,
            "timm": dict(timm or {}),
        }
        refuse(self.config["timm"])
        self.vit = _create(name, self.timm_arguments())
        rate = self.config["timm"].get("drop_path_rate", 0.0)
        set_drop_paths(self.vit.blocks, drop_path, rate, uniform=DropPath)
        patch = _square(self.vit.patch_embed.patch_size)
        grid = _grid(img_size, patch)
        self.spec = Spec(self.vit.embed_dim, patch, grid, len(self.vit.blocks))
        self.bias = self._relative_bias(positions) if positions.startswith("relative") else None
        INITIALISE[init](self.vit)
        if positions.startswith("sincos"):
            self._fix_positions(rows_first=positions == "sincos_rows_first")
        if freeze_patch_embed:
            self.vit.patch_embed.requires_grad_(False)

    def timm_arguments(self) -> dict[str, Any]:
        """What `timm.create_model(name, ...)` needs to build the same network."""
        arguments: dict[str, Any] = {"img_size": self.config["img_size"], "num_classes": 0}
        if self.config["patch_size"] is not None:
            arguments["patch_size"] = self.config["patch_size"]
        if self.config["positions"].startswith("relative"):
            arguments["pos_embed"] = "none"
        # Token pooling keeps the final norm where tokens see it: 'avg' would move it to fc_norm.
        return {"global_pool": "token", **arguments, **self.config["timm"]}

    def timm_sheet(self) -> dict[str, Any] | None:
        if self.bias is not None:
            return None  # timm's plain ViT has no relative positions
        return {"name": self.config["name"], "arguments": self.timm_arguments()}

    def sites(self) -> dict[str, nn.Module]:
        return {name: module for name, module in self.vit.named_modules() if name}

    def normed(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.vit.norm(tokens)

    def attentions(self) -> list[nn.Module]:
        return [block.get_submodule("attn") for block in self.vit.blocks]

    def forward(
        self,
        image: Float[Tensor, "B 3 H W"],
        mask: Mask | None = None,
        fill: Float[Tensor, " D"] | None = None,
        layers: tuple[int, ...] = (),
    ) -> Tokens:
        vit, patch = self.vit, self.spec.patch
        grid = (image.shape[2] // patch, image.shape[3] // patch)
        x = vit.patch_embed(image)  # (B, N, D)
        if mask is not None and fill is not None:
            x = torch.where(mask.hidden[..., None], fill.to(x.dtype), x)
        prefix, x = self._place(x, grid)
        if mask is not None and fill is None:
            x = x.gather(1, mask.kept()[..., None].expand(-1, -1, x.shape[2]))  # (B, n, D)
        x = vit.norm_pre(vit.pos_drop(torch.cat([prefix, x], 1)))
        biases = self._attention_biases(grid, dropped=mask is not None and fill is None)
        outputs: dict[int, Tensor] = {}
        for i, (block, bias) in enumerate(zip(vit.blocks, biases, strict=True)):
            x = block(x) if bias is None else block(x, attn_mask=bias)
            if i in layers:
                outputs[i] = x
        x = vit.norm(x)
        r = prefix.shape[1]
        return Tokens(x[:, :r], x[:, r:], mask, outputs)

    def _place(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Add positions; class token and registers are made apart from the patches."""
        vit, b = self.vit, x.shape[0]  # len() would fix the batch of an exported graph
        prefix = [t.expand(b, -1, -1) for t in (vit.cls_token, vit.reg_token) if t is not None]
        first = torch.cat(prefix, 1) if prefix else x[:, :0]
        if vit.pos_embed is None:
            return first, x
        count = 0 if vit.no_embed_class else vit.num_prefix_tokens
        method = self.config["interpolation"]
        table = resize_positions(vit.pos_embed, self.spec.grid, grid, count, method)
        return (first if count == 0 else first + table[:, :count]), x + table[:, count:]

    def _relative_bias(self, positions: Positions) -> RelativeBias | nn.ModuleList:
        if self.vit.num_prefix_tokens != 1:
            raise UserError(
                f"positions: {positions} needs one class token and no registers, the model has "
                f"{self.vit.num_prefix_tokens} prefix tokens; set model.backbone.init_args.timm"
            )
        heads: int = self.vit.blocks[0].attn.num_heads  # pyright: ignore
        if positions == "relative":
            return RelativeBias(self.spec.grid, heads)
        return nn.ModuleList(RelativeBias(self.spec.grid, heads) for _ in self.vit.blocks)

    def _attention_biases(self, grid: tuple[int, int], *, dropped: bool) -> list[Tensor | None]:
        """One for each block."""
        if self.bias is None:
            return [None] * self.spec.depth
        if dropped or grid != self.spec.grid:
            raise UserError(
                f"positions: relative knows the whole grid of {self.spec.grid} patches only, given "
                f"{'dropped patches' if dropped else f'a grid of {grid}'}; use a mask with fill: "
                "true and crops of one size, or other positions"
            )
        if isinstance(self.bias, RelativeBias):
            return [self.bias.get_bias()] * self.spec.depth
        return [bias.get_bias() for bias in self.bias]  # pyright: ignore[reportCallIssue]

    @torch.no_grad()
    def _fix_positions(self, *, rows_first: bool) -> None:
        vit = self.vit
        count = 0 if vit.no_embed_class else vit.num_prefix_tokens
        table = sincos(self.spec.dim, self.spec.grid, rows_first=rows_first)
        assert vit.pos_embed is not None
        vit.pos_embed.copy_(torch.cat([table.new_zeros(count, self.spec.dim), table])[None])
        vit.pos_embed.requires_grad_(False)


def _create(name: str, arguments: dict[str, Any]) -> TimmViT:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models("*vit*"), n=3, cutoff=0.5)
        raise UserError(
            f"timm knows no model {name!r}; near: {', '.join(near) or 'none'}; "
            "set model.backbone.init_args.name"
        )
    try:
        vit = timm.create_model(name, pretrained=False, **arguments)
    except (TypeError, AssertionError, ZeroDivisionError) as error:  # timm's words name the culprit
        raise UserError(
            f"timm cannot build {name}: {str(error) or type(error).__name__}; given {arguments}; "
            "a VisionTransformer takes them; set model.backbone.init_args.name, patch_size or timm"
        ) from error
    # Not a subclass either: the distilled DeiT adds a token that nothing here would place.
    found = vit.patch_embed if type(vit) is TimmViT else vit
    if not isinstance(vit, TimmViT) or type(found) is not PatchEmbed:
        raise UserError(
            f"{name} has a {type(found).__name__}; contramask trains timm's VisionTransformer with "
            "its PatchEmbed; set model.backbone.init_args.name"
        )
    vit.patch_embed.strict_img_size = False  # local crops are smaller; positions are resampled
    return vit


def _square(size: tuple[int, int]) -> int:
    if size[0] != size[1]:
        raise UserError(f"patches are {size}; they must be square; set patch_size")
    return size[0]


def _grid(img_size: int | tuple[int, int], patch: int) -> tuple[int, int]:
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if height % patch or width % patch or min(height, width) < patch:
        raise UserError(
            f"images of {height} x {width} pixels are no whole number of patches of {patch}; "
            "set model.backbone.init_args.img_size or patch_size"
        )
    return height // patch, width // patch
