"""Positions of patches on another grid: absolute ones resized, relative ones as a bias."""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.interpolate import RectBivariateSpline
from torch import Tensor, nn

Interpolation = Literal["antialias", "plain", "dino"]

# DINO asks for a tenth of a patch more, so that rounding never loses a row; the scale that is used
# for sampling carries it too, and released weights were trained with it.
DINO_OFFSET = 0.1


def resize_positions(
    table: Float[Tensor, "1 P D"],
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    prefix: int,
    method: Interpolation = "antialias",
) -> Float[Tensor, "1 Q D"]:
    """A table of absolute positions for another grid of patches, bicubic.

    Args:
        table: `prefix` positions of class token and registers, then those of the patches by row.
        old_grid: rows and columns of the table.
        new_grid: rows and columns that are wanted; the same grid gives the same table.
        prefix: how many positions at the front belong to no patch; they are kept as they are.
        method: `antialias` (timm), `plain` without antialiasing (MAE, BEiT), or `dino`: without
            it, by the scale (new + 0.1) / old (DINO arXiv:2104.14294, iBOT, DINOv2's first models).
    """
    if new_grid == old_grid:
        return table
    first, patches = table[:, :prefix], table[:, prefix:]
    image = patches.float().unflatten(1, old_grid).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    if method == "dino":
        scale = tuple(
            (new + DINO_OFFSET) / old for new, old in zip(new_grid, old_grid, strict=True)
        )
        image = F.interpolate(image, scale_factor=scale, mode="bicubic")
    else:
        image = F.interpolate(image, new_grid, mode="bicubic", antialias=method == "antialias")
    return torch.cat([first, image.flatten(2).mT.to(table.dtype)], 1)


def resize_relative(
    table: Float[Tensor, "P H"], old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[Tensor, "Q H"]:
    """A table of `RelativeBias` for another grid of patches, as BEiT's fine-tuning makes it.

    Near differences keep their meaning in patches, far ones are stretched: the n-th place from the
    middle moves to 1 + q + ... + q^(n-1), q such that the last one meets the end of the new table.
    Cubic splines in between. A smaller table is the middle of the larger.

    Args:
        table: (2 rows - 1)(2 columns - 1) differences by row and three of the class token, by head.
        old_grid: rows and columns of patches; the same grid gives the same table.
        new_grid: rows and columns that are wanted.
    """
    if new_grid == old_grid:
        return table
    old, new = ([2 * side - 1 for side in grid] for grid in (old_grid, new_grid))
    rows, columns = (_stretched(a, b) for a, b in zip(old, new, strict=True))
    down, right = (np.arange(b) - b // 2 for b in new)
    kx, ky = (min(3, side - 1) for side in old)
    heads = [
        RectBivariateSpline(rows, columns, bias, kx=kx, ky=ky)(down, right)
        for bias in table[:-3].T.unflatten(1, tuple(old)).double().cpu().numpy()
    ]
    resized = torch.from_numpy(np.stack(heads, -1)).flatten(0, 1)
    return torch.cat([resized.to(table), table[-3:]])


def _stretched(old: int, new: int) -> Float[np.ndarray, " old"]:
    """Where `old` differences lie among `new` ones, 0 in the middle."""
    low, high = 1.01, 1.5  # BEiT's limits of q
    while high - low > 1e-6:
        ratio = (low + high) / 2
        end = np.sum(ratio ** np.arange(old // 2))
        low, high = (low, ratio) if end > new // 2 else (ratio, high)
    far = np.cumsum(low ** np.arange(old // 2))
    return np.concatenate([-far[::-1], [0.0], far])


class RelativeBias(nn.Module):
    """A learned number for each head and difference of two places (BEiT, arXiv:2106.08254).

    Three more for the class token: from it, to it, and to itself.

    Args:
        grid: rows and columns of patches.
        heads: of the attention.
    """

    index: Tensor

    def __init__(self, grid: tuple[int, int], heads: int):
        super().__init__()
        rows, columns = grid
        count = (2 * rows - 1) * (2 * columns - 1)
        # The name it has in the released weights.
        self.relative_position_bias_table = nn.Parameter(torch.zeros(count + 3, heads))
        place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))  # (N, 2)
        down, right = (place[:, None] - place[None]).unbind(-1)  # (N, N) each
        index = torch.empty(1 + len(place), 1 + len(place), dtype=torch.long)
        index[1:, 1:] = (down + rows - 1) * (2 * columns - 1) + right + columns - 1
        index[0, :], index[:, 0], index[0, 0] = count, count + 1, count + 2
        self.register_buffer("index", index, persistent=False)

    def get_bias(self) -> Float[Tensor, "1 H M M"]:
        """What is added to the attention, M = 1 + N tokens with the class token first."""
        return self.relative_position_bias_table[self.index].permute(2, 0, 1)[None].contiguous()
