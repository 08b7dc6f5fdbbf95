"""Blocks of patches hidden together: BEiT, iBOT, DINOv2 and MaskFeat."""

from abc import abstractmethod
from random import Random
from typing import Literal

import numpy as np
import torch

from contramask.errors import need_one_of
from contramask.masks.masking import Masking
from contramask.masks.rectangles import hide_blocks, hide_scattered, stack
from contramask.types import Mask, Spec, Step, UserError, fold

Shape = Literal["block", "random"]


class _PerImage(Masking):
    """A mask that draws for one crop of one image at a time."""

    def __init__(self, spec: Spec, *, fill: bool, fill_std: float = 0.02):
        super().__init__(spec, fill=fill, fill_std=fill_std)
        self.grid = spec.grid

    @abstractmethod
    def amounts(self, name: str, batch: int, crops: int, step: Step) -> list[list[float]]:
        """Patches to hide in each crop of each of this micro-batch's images: (crops, batch)."""

    @abstractmethod
    def hide(self, random: Random, total: float) -> int:
        """The hidden patches of one crop, as the bits of a number."""

    @property
    def visible(self) -> int | None:
        """How many patches every image keeps; None where it varies."""
        return None

    def sample(
        self, name: str, batch: int, crops: int, step: Step, device: torch.device | str
    ) -> Mask:
        drawn = []
        for crop, amounts in enumerate(self.amounts(name, batch, crops, step)):
            for row, amount in enumerate(amounts, start=step.row):
                random = Random(fold(step.seed, step.index, f"mask/{name}", row, crop))
                drawn.append(self.hide(random, amount))
        hidden = stack(drawn, self.grid[0] * self.grid[1], device)
        return Mask(hidden, hidden[:, None], self.visible)


class BlockMasking(_PerImage):
    """Blocks; every image hides equally many patches.

    BEiT (arXiv:2106.08254): 75 of 196, blocks of at least 16. MaskFeat (arXiv:2112.09133): 78 of
    196, at least 15.

    Args:
        spec: of the backbone.
        count: patches hidden in each image.
        smallest: area of a block, patches.
        largest: most patches one block may add; None: `count`.
        aspect: least ratio of a block's height to its width, up to its inverse.
        exact: make up what blocks leave over by single patches; False, as BEiT's code, may hide
            fewer and then varies between images.
        fill: True puts a learned token in the place of a hidden patch, False drops it (needs
            `exact`).
    """

    def __init__(
        self,
        spec: Spec,
        *,
        count: int,
        smallest: int = 16,
        largest: int | None = None,
        aspect: float = 0.3,
        exact: bool = True,
        fill: bool = True,
    ):
        super().__init__(spec, fill=fill)
        if not 0 < count < spec.patches:
            raise UserError(
                f"mask count is {count} of {spec.patches} patches; at least one must be hidden and "
                "one visible; set model.masks.NAME.init_args.count"
            )
        if not exact and not fill:
            raise UserError(
                "mask: exact is false and fill is false: images would keep different numbers of "
                "patches, which cannot be dropped; set one of them at model.masks.NAME.init_args"
            )
        self.count, self.exact = count, exact
        self.smallest, self.largest, self.aspect = smallest, largest, _aspect(aspect)

    @property
    def visible(self) -> int | None:
        return self.grid[0] * self.grid[1] - self.count if self.exact else None

    def amounts(self, name: str, batch: int, crops: int, step: Step) -> list[list[float]]:
        return [[float(self.count)] * batch] * crops

    def hide(self, random: Random, total: float) -> int:
        return hide_blocks(
            random,
            self.grid,
            total=total,
            smallest=self.smallest,
            largest=self.largest,
            aspect=self.aspect,
            exact=self.exact,
        )


class VariedBlockMasking(_PerImage):
    """Each crop is left whole or hides a fraction of its own (iBOT, arXiv:2111.07832).

    Args:
        spec: of the backbone.
        ratio: range of the hidden fraction.
        whole: probability that nothing of a crop is hidden.
        shape: `block`, or `random` single patches (the authors' "Rand" models).
        aspect: least ratio of a block's height to its width, up to its inverse.
        start: fraction of training before which nothing is hidden (the authors' pred_start_epoch:
            50 of 300 epochs for Swin).
        fill_std: standard deviation that the token of hidden patches is drawn with; 0: zeros.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        ratio: tuple[float, float] = (0.1, 0.5),
        whole: float = 0.5,
        shape: Shape = "block",
        aspect: float = 0.3,
        start: float = 0.0,
        fill_std: float = 0.0,
    ):
        super().__init__(spec, fill=True, fill_std=fill_std)
        self.ratio, self.whole, self.aspect = _range(ratio), whole, _aspect(aspect)
        need_one_of(shape, Shape, "mask shape", "model.masks.NAME.init_args.shape")
        if not (0 <= whole <= 1 and 0 <= start <= 1):
            raise UserError(
                f"mask: whole is {whole} and start {start}; whole is a probability, start a "
                "fraction of training, both in [0, 1]; set model.masks.NAME.init_args"
            )
        self.shape, self.start = shape, start

    def amounts(self, name: str, batch: int, crops: int, step: Step) -> list[list[float]]:
        def amount(crop: int, row: int) -> float:
            random = Random(fold(step.seed, step.index, f"mask/{name}/ratio", row, crop))
            if random.random() < self.whole or step.progress < self.start:
                return 0.0
            return random.uniform(*self.ratio) * self.grid[0] * self.grid[1]

        rows = range(step.row, step.row + batch)
        return [[amount(crop, row) for row in rows] for crop in range(crops)]

    def hide(self, random: Random, total: float) -> int:
        if self.shape == "random":
            return hide_scattered(random, self.grid, total=total)
        smallest = (min(self.grid) // 3) ** 2
        return hide_blocks(random, self.grid, total=total, smallest=smallest, aspect=self.aspect)


class StratifiedBlockMasking(_PerImage):
    """A fixed share of all crops is masked, in fractions spread evenly (DINOv2, arXiv:2304.07193).

    Of all crops of the global batch `int(masked x crops)` are hidden in part. The range of
    fractions is cut into as many equal strata, one crop draws from each, and all are shuffled.

    Args:
        spec: of the backbone.
        ratio: range of the hidden fraction.
        masked: share of the crops that are masked.
        smallest: area of a block, patches.
        largest: most patches one block may add; None: half the rows, rounded down, times the
            columns, which is the authors' integer arithmetic.
        aspect: least ratio of a block's height to its width, up to its inverse.
        exact: make up what blocks leave over by single patches (DINOv3).
        fill_std: standard deviation that the token of hidden patches is drawn with; 0: zeros.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        ratio: tuple[float, float] = (0.1, 0.5),
        masked: float = 0.5,
        smallest: int = 4,
        largest: int | None = None,
        aspect: float = 0.3,
        exact: bool = False,
        fill_std: float = 0.0,
    ):
        super().__init__(spec, fill=True, fill_std=fill_std)
        self.ratio, self.masked, self.exact = _range(ratio), masked, exact
        self.smallest, self.largest = smallest, largest or spec.grid[0] // 2 * spec.grid[1]
        self.aspect = _aspect(aspect)
        if not 0 < masked <= 1:
            raise UserError(
                f"mask: masked is {masked}; it is the share of the crops that are masked, in "
                "(0, 1]; set model.masks.NAME.init_args.masked"
            )

    def amounts(self, name: str, batch: int, crops: int, step: Step) -> list[list[float]]:
        random = Random(fold(step.seed, step.index, f"mask/{name}/ratio"))
        rows = max(step.rows, step.row + batch)
        number, patches = int(crops * rows * self.masked), self.grid[0] * self.grid[1]
        edges = np.linspace(*self.ratio, number + 1).tolist()
        drawn = [int(patches * random.uniform(*edges[i : i + 2])) for i in range(number)]
        drawn += [0] * (crops * rows - number)
        random.shuffle(drawn)
        own = slice(step.row, step.row + batch)
        return [list(map(float, drawn[crop * rows :][own])) for crop in range(crops)]

    def hide(self, random: Random, total: float) -> int:
        return hide_blocks(
            random,
            self.grid,
            total=total,
            smallest=self.smallest,
            largest=self.largest,
            aspect=self.aspect,
            exact=self.exact,
        )


def _range(ratio: tuple[float, float]) -> tuple[float, float]:
    if not 0 < ratio[0] <= ratio[1] < 1:
        raise UserError(
            f"mask ratio is {ratio}; it is a range of hidden fractions inside (0, 1), smaller "
            "number first; set model.masks.NAME.init_args.ratio"
        )
    return ratio


def _aspect(aspect: float) -> float:
    if not 0 < aspect <= 1:
        raise UserError(
            f"mask aspect is {aspect}; it is the least height over width of a block, in (0, 1]; "
            "set model.masks.NAME.init_args.aspect"
        )
    return aspect
