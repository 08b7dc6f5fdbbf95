"""What a ViT's tensors say of its architecture: all but the number of heads."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from contramask.functional.patches import sincos
from contramask.models.positions import Interpolation, resize_positions, resize_relative
from contramask.types import UserError

NAMES = {
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
    1280: "vit_huge_patch14_224",
}
GATED = "vit_giant_patch14_dinov2"  # timm's one ViT with a packed SwiGLU of these tensors
TABLE = "relative_position_bias_table"


@dataclass(frozen=True)
class Wishes:
    """What the user says of a file; None: what its tensors say.

    Attributes:
        heads: of the attention.
        grid: rows and columns of patches; None: as many of each.
        img_size: the side of images to convert for; positions are resized.
        name: of the model in timm.
        interpolation: of positions; None: as the authors do.
    """

    heads: int | None = None
    grid: tuple[int, int] | None = None
    img_size: int | None = None
    name: str | None = None
    interpolation: Interpolation | None = None


@dataclass(frozen=True)
class Sizes:
    """Read from the shapes of one state dict in timm's names."""

    dim: int
    patch: int
    depth: int
    hidden: int
    gated: bool


def read_sizes(state: Mapping[str, Tensor], source: str) -> Sizes:
    """Width, patch, depth, hidden width.

    Raises:
        UserError: these are not the tensors of a plain ViT.
    """
    blocks = {int(m[1]) for k in state if (m := re.match(r"blocks\.(\d+)\.", k))}
    first, second = (state.get(f"blocks.0.mlp.fc{i}.weight") for i in (1, 2))
    proj = state["patch_embed.proj.weight"]
    if first is None or second is None or blocks != set(range(len(blocks))):
        raise UserError(
            f"{source}: another architecture than a plain ViT (its blocks are {_few(state)}); "
            "contramask imports timm's VisionTransformer and what equals it"
        )
    if proj.ndim != 4 or proj.shape[1] != 3 or proj.shape[2] != proj.shape[3]:
        raise UserError(
            f"{source}: patch_embed.proj.weight is {tuple(proj.shape)}; square patches of three "
            "colours, (D, 3, P, P), can be imported"
        )
    gated = first.shape[0] != second.shape[1]
    return Sizes(proj.shape[0], proj.shape[2], len(blocks), first.shape[0], gated)


def infer(
    state: dict[str, Tensor],
    *,
    source: str,
    heads: Mapping[int, int],
    interpolation: Interpolation,
    wishes: Wishes,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of `VisionTransformer` for a state dict, and the state for the wanted size.

    Args:
        state: in timm's names, relative positions under `bias.`.
        source: the file, for messages.
        heads: by width, where nothing tells them.
        interpolation: how the authors resize positions.
        wishes: of the user.

    Raises:
        UserError: what cannot be read from shapes and was not said.
    """
    sizes = read_sizes(state, source)
    method = wishes.interpolation or interpolation
    tables = [k for k in state if k.startswith("bias.")]
    grid, prefix = (
        (_relative_grid(state[tables[0]], wishes, source), 0)
        if tables
        else _grid(state, wishes, source)
    )
    new = grid if wishes.img_size is None else _new_grid(wishes.img_size, sizes.patch)
    if tables:
        number = wishes.heads or state[tables[0]].shape[1]
        kind = "relative" if tables[0] == f"bias.{TABLE}" else "relative_per_block"
        resized = {k: resize_relative(state[k], grid, new) for k in tables}
    else:
        number = wishes.heads or heads.get(sizes.dim) or _no_heads(sizes.dim, heads, source)
        table = state["pos_embed"]
        kind = _kind(table, prefix, grid) if new == grid else "learned"
        resized = {"pos_embed": resize_positions(table, grid, new, prefix, method)}
    return {
        "name": wishes.name or (GATED if sizes.gated else NAMES.get(sizes.dim, NAMES[768])),
        "img_size": (new[0] * sizes.patch, new[1] * sizes.patch),
        "patch_size": sizes.patch,
        "positions": kind,
        "interpolation": method,
        "timm": {"num_heads": number, **_timm(state, sizes, prefix)},
    }, {**state, **resized}


def _no_heads(dim: int, heads: Mapping[int, int], source: str) -> NoReturn:
    raise UserError(
        f"{source}: a width of {dim} does not tell the number of heads; give --heads "
        f"(known widths and heads: {', '.join(f'{d}: {h}' for d, h in heads.items())})"
    )


def _timm(state: Mapping[str, Tensor], sizes: Sizes, prefix: int) -> dict[str, Any]:
    found: dict[str, Any] = {"embed_dim": sizes.dim, "depth": sizes.depth}
    ratio = sizes.hidden / sizes.dim
    # timm takes the whole part of dim * ratio, which rounding can push below the number itself.
    exact = int(sizes.dim * ratio) == sizes.hidden
    found["mlp_ratio"] = ratio if exact else (sizes.hidden + 0.5) / sizes.dim
    if "blocks.0.attn.qkv.bias" not in state:
        found["qkv_bias"] = False
    if "blocks.0.attn.q_norm.weight" in state:
        found["qk_norm"] = True
    if "blocks.0.ls1.gamma" in state:
        found["init_values"] = 1e-5
    if "norm_pre.weight" in state:
        found["pre_norm"] = True
    if "cls_token" not in state:
        found |= {"class_token": False, "global_pool": ""}
    if "reg_token" in state:
        found["reg_tokens"] = state["reg_token"].shape[1]
    if "pos_embed" in state and prefix < _prefix(state):
        found["no_embed_class"] = True
    return found


def _prefix(state: Mapping[str, Tensor]) -> int:
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    return registers + ("cls_token" in state)


def _square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def _grid(state: Mapping[str, Tensor], wishes: Wishes, source: str) -> tuple[tuple[int, int], int]:
    """Rows and columns, and how many positions belong to no patch."""
    table = state.get("pos_embed")
    if table is None:
        raise UserError(
            f"{source}: no pos_embed and no relative positions; rotary and other positions cannot "
            "be imported"
        )
    count, prefix = table.shape[1], _prefix(state)
    if wishes.grid is not None:
        patches = wishes.grid[0] * wishes.grid[1]
        if count - patches not in (0, prefix):
            raise UserError(
                f"{source}: --grid {wishes.grid[0]} {wishes.grid[1]} does not fit {count} "
                f"positions, {prefix} of them perhaps of class token and registers"
            )
        return wishes.grid, count - patches
    # Whether class token and registers have positions is told by which count is a square.
    used = next((n for n in (prefix, 0) if _square(count - n)), None)
    if used is None:
        raise UserError(f"{source}: {count} positions are no square grid; give --grid ROWS COLUMNS")
    side = math.isqrt(count - used)
    return (side, side), used


def _relative_grid(table: Tensor, wishes: Wishes, source: str) -> tuple[int, int]:
    """(2 rows - 1)(2 columns - 1) differences, and three of the class token."""
    rows, columns = wishes.grid or (0, 0)
    if wishes.grid is None:
        rows = columns = (math.isqrt(max(table.shape[0] - 3, 0)) + 1) // 2
    if (2 * rows - 1) * (2 * columns - 1) + 3 != table.shape[0]:
        raise UserError(
            f"{source}: {table.shape[0]} relative positions are not those of "
            f"{'a square grid' if wishes.grid is None else wishes.grid}; give --grid ROWS COLUMNS"
        )
    return rows, columns


def _new_grid(size: int, patch: int) -> tuple[int, int]:
    if size < patch or size % patch:
        raise UserError(f"--img_size {size} is no whole number of patches of {patch} pixels")
    return size // patch, size // patch


def _kind(table: Tensor, prefix: int, grid: tuple[int, int]) -> str:
    """`sincos`, either way round, where the table is that; else `learned`."""
    if table.shape[2] % 4 == 0 and not table[0, :prefix].any():
        for kind, rows_first in (("sincos", False), ("sincos_rows_first", True)):
            expected = sincos(table.shape[2], grid, rows_first=rows_first)
            if torch.allclose(table[0, prefix:].float(), expected, rtol=0, atol=1e-3):
                return kind
    return "learned"


def _few(state: Mapping[str, Tensor]) -> str:
    return f"{', '.join(sorted(state)[:3])} ..."
