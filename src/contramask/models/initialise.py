"""How the official codes initialise a ViT, by the names in which they differ."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

Init = Literal["timm", "mae", "mocov3", "simmim", "dino"]


def _init_timm(vit: Any) -> None:
    """timm initialised it already."""


def _linears(vit: Any) -> list[tuple[str, nn.Linear]]:
    return [(n, m) for n, m in vit.named_modules() if isinstance(m, nn.Linear)]


@torch.no_grad()
def _init_mae(vit: Any) -> None:
    """MAE: one xavier matrix for q, k, v together; the patch bias keeps the default."""
    for _, linear in _linears(vit):
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
    nn.init.xavier_uniform_(vit.patch_embed.proj.weight.flatten(1))
    for token in (vit.cls_token, vit.reg_token):
        if token is not None:
            nn.init.normal_(token, std=0.02)


@torch.no_grad()
def _init_mocov3(vit: Any) -> None:
    """MoCo v3: q, k, v are three xavier matrices; the patch projection is one as well."""
    for name, linear in _linears(vit):
        rows = linear.out_features // 3 if "qkv" in name else linear.out_features
        limit = math.sqrt(6 / (rows + linear.in_features))
        nn.init.uniform_(linear.weight, -limit, limit)
        nn.init.zeros_(linear.bias)
    proj = vit.patch_embed.proj
    limit = math.sqrt(6 / (proj.weight[0].numel() + vit.embed_dim))
    nn.init.uniform_(proj.weight, -limit, limit)
    nn.init.zeros_(proj.bias)
    if vit.cls_token is not None:
        nn.init.normal_(vit.cls_token, std=1e-6)


@torch.no_grad()
def _init_simmim(vit: Any) -> None:
    """SimMIM, BEiT: normal of 0.02 cut at one sigma; last matrices of block l over sqrt(2 l)."""
    weights = [linear.weight for _, linear in _linears(vit)] + [vit.patch_embed.proj.weight]
    for weight in [*weights, *(t for t in (vit.cls_token, vit.reg_token) if t is not None)]:
        nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)
    for _, linear in _linears(vit):
        nn.init.zeros_(linear.bias)
    for i, block in enumerate(vit.blocks, start=1):
        block.attn.proj.weight.div_(math.sqrt(2 * i))
        block.mlp.fc2.weight.div_(math.sqrt(2 * i))


@torch.no_grad()
def _init_dino(vit: Any) -> None:
    """DINO, iBOT: all but the patch projection from a normal of 0.02, the class token too."""
    for _, linear in _linears(vit):
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    for token in (vit.cls_token, vit.pos_embed):
        if token is not None:
            nn.init.trunc_normal_(token, std=0.02)


INITIALISE: dict[Init, Callable[[Any], None]] = {
    "timm": _init_timm,
    "mae": _init_mae,
    "mocov3": _init_mocov3,
    "simmim": _init_simmim,
    "dino": _init_dino,
}
