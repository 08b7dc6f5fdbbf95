"""One context and several target blocks: the masks of I-JEPA. arXiv:2301.08243, section 3."""

import math
from dataclasses import replace
from random import Random
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from contramask.masks.masking import Masking
from contramask.types import Mask, Spec, Step, UserError, fold

TRIES = 20  # at a context, before one target block may overlap it; the authors' number

Size = tuple[int, int]  # rows, columns
Cut = Literal["update", "batch"]


class MultiblockMasking(Masking):
    """Target blocks anywhere; a large context block without what they cover; the rest is hidden.

    Sizes are drawn once for all images of an update, places for each. A context must keep more
    than `least` patches: it is drawn again up to 20 times, then one target block fewer is taken
    out of it, and so on. Where targets leave contexts of different sizes, all are cut to the
    smallest by dropping their last patches in row-major order, so that tokens are one tensor.

    Args:
        spec: of the backbone.
        blocks: target blocks of an image.
        scale: range of a target block's area, as a fraction of the image's.
        aspect: range of its height / width.
        context: range of the context block's area; it is square.
        least: a context has more patches than this.
        overlap: the context may hold patches of target blocks.
        linked: one random number decides the area and the aspect of a target block, as in the
            authors' code: large blocks are high ones. False: two independent numbers.
        reach: blocks may touch the last row and column; in the authors' code they end before.
        cut: contexts are cut to the smallest of the `update`, whatever ranks it is spread over, or
            of this rank's micro-`batch`, as in the authors' code: 128 images leave 50 patches of
            ViT-B/16 where 2048 leave 41 (means over 60 steps).
    """

    def __init__(
        self,
        spec: Spec,
        *,
        blocks: int = 4,
        scale: tuple[float, float] = (0.15, 0.2),
        aspect: tuple[float, float] = (0.75, 1.5),
        context: tuple[float, float] = (0.85, 1.0),
        least: int = 10,
        overlap: bool = False,
        linked: bool = True,
        reach: bool = False,
        cut: Cut = "update",
    ):
        super().__init__(spec, fill=False)
        self.grid, self.blocks, self.least = spec.grid, blocks, least
        self.scale, self.aspect, self.context = scale, aspect, context
        self.overlap, self.linked, self.reach, self.cut = overlap, linked, reach, cut
        self._check()

    def _check(self) -> None:
        where = "set it at model.masks.NAME.init_args"
        for name, (low, high), top in (
            ("scale", self.scale, 1.0),
            ("context", self.context, 1.0),
            ("aspect", self.aspect, math.inf),
        ):
            if not 0 < low <= high <= top:
                raise UserError(
                    f"mask {name} is ({low}, {high}); it is a range above 0"
                    f"{' and at most 1' * (top == 1)}, smaller number first; {where}"
                )
        if self.blocks < 1 or min(self.grid) < 2:
            raise UserError(
                f"mask: {self.blocks} blocks on a grid of {self.grid}; at least one block and two "
                f"rows and columns are needed; {where}, or a smaller patch"
            )
        height, width = self._size(self.context, (1.0, 1.0), 0.0, 0.0)
        if not 0 <= self.least < height * width:
            raise UserError(
                f"mask: least is {self.least}, and the smallest context block has {height} x "
                f"{width} patches; it must have more; {where}"
            )

    def sample(
        self, name: str, batch: int, crops: int, step: Step, device: torch.device | str
    ) -> Mask:
        # All rows of the update, on the host: sizes that all ranks agree on become shapes.
        whole, rows = replace(step, row=0), max(step.rows, step.row + batch)
        target, context = self.sizes(Random(fold(step.seed, step.index, f"mask/{name}/size")))
        places = whole.rand(f"mask/{name}/targets", rows, crops, self.blocks, 2)
        targets = self.cover(places, target).flatten(0, 1)  # (rows x crops, T, N)
        seen = self._contexts(name, targets, context, whole, crops)

        def own(x: Tensor) -> Tensor:  # (rows x crops, ...) -> (VB, ...), crop-major
            mine = x.unflatten(0, (rows, crops))[step.row : step.row + batch]
            return mine.transpose(0, 1).flatten(0, 1)

        fewest = int((seen if self.cut == "update" else own(seen)).sum(1).min())
        hidden = ~own(seen & (seen.cumsum(1) <= fewest))
        hidden, asked = (x.to(device, non_blocking=True) for x in (hidden, own(targets)))
        return Mask(hidden, asked, fewest)

    def sizes(self, random: Random) -> tuple[Size, Size]:
        """Rows and columns of all target blocks and of all context blocks of an update."""
        first, second, third = random.random(), random.random(), random.random()
        target = self._size(self.scale, self.aspect, first, first if self.linked else second)
        return target, self._size(self.context, (1.0, 1.0), third, third)

    def cover(self, places: Float[Tensor, "*B 2"], size: Size) -> Bool[Tensor, "*B N"]:
        """The patches of blocks of a size at uniform places in [0, 1) of (row, column)."""
        parts = []
        for axis in (0, 1):
            free = self.grid[axis] - size[axis] + self.reach  # first rows a block may begin at
            begin = (places[..., axis, None] * free).long()
            line = torch.arange(self.grid[axis])
            parts.append((line >= begin) & (line < begin + size[axis]))
        return (parts[0][..., :, None] & parts[1][..., None, :]).flatten(-2)

    def _size(
        self, scale: tuple[float, float], aspect: tuple[float, float], u: float, v: float
    ) -> Size:
        area = int(self.grid[0] * self.grid[1] * (scale[0] + u * (scale[1] - scale[0])))
        ratio = aspect[0] + v * (aspect[1] - aspect[0])
        sides = (round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio)))
        height, width = (
            max(1, min(n, most - 1)) for n, most in zip(sides, self.grid, strict=True)
        )  # always smaller than the image, as the authors'
        return height, width

    def _contexts(
        self, name: str, targets: Bool[Tensor, "R T N"], size: Size, whole: Step, crops: int
    ) -> Bool[Tensor, "R N"]:
        seen = torch.zeros_like(targets[:, 0])
        todo, attempt = torch.arange(len(seen)), 0
        while len(todo):
            drawn = whole.rand(f"mask/{name}/context/{attempt}", len(seen) // crops, crops, 2)
            kept = 0 if self.overlap else max(self.blocks - attempt // TRIES, 0)
            block = self.cover(drawn.flatten(0, 1)[todo], size)
            block = block & ~targets[todo, :kept].any(1)
            found = block.sum(1) > self.least
            seen[todo[found]] = block[found]
            todo, attempt = todo[~found], attempt + 1
        return seen
