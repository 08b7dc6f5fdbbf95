"""Exact search for nearest neighbours, of which no part and no order changes the result."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Metric = Literal["cosine", "dot", "l2"]
Gather = Callable[[Tensor], Tensor]

NOBODY = torch.iinfo(torch.long).max  # the number of a neighbour that is still to be found


class Nearest(NamedTuple):
    """Neighbours of Q queries, nearest first; of equally near ones the lower number first."""

    similarities: Float[Tensor, "Q k"]  # cosine, inner product, or minus the squared distance
    numbers: Int[Tensor, "Q k"]  # of the bank's rows


class Search:
    """Finds the k nearest of a bank that comes in parts: `add` each, in any order, then `found`.

    Exact: every query meets every row. Similarities are of float32, under autocast and TF32 too
    (float64 for float64 queries), and of tiles of one shape, padded where rows are missing. A
    library that computes all elements of a product of one shape alike, as MKL does, so gives a pair
    one similarity, whatever the parts and the other rows; then the parts, their order and their
    spread over ranks change nothing, ties included: of equal similarities the lower number is the
    nearer one.

    Memory: `bytes_held`, of which no term grows with the bank.

    Args:
        queries: rows.
        k: how many.
        metric: `cosine` (rows of zeros have cosine 0 with all), `dot`, the inner product, or `l2`.
        centre: subtracted from both sides for `l2`, the mean of the bank or a point near it; it
            changes no distance, and keeps them from cancelling where all rows are far from 0.
        own: the number of each query in the bank; that row is left out. -1: it is not there.
        elements: the most similarities held at once.
    """

    def __init__(
        self,
        queries: Float[Tensor, "Q D"],
        *,
        k: int,
        metric: Metric = "cosine",
        centre: Float[Tensor, " D"] | None = None,
        own: Int[Tensor, " Q"] | None = None,
        elements: int = 2**26,
    ):
        self.k, self.metric, self.own = k, metric, own
        self.centre = None if centre is None else centre.to(queries)
        self.rows, self.columns, self.width = _tile(queries.device, max(1, elements))
        x, self._squares = self._prepared(queries)
        self.queries = F.pad(x, (0, 0, 0, -len(x) % self.rows))
        self._near = queries.new_full((len(x), k), -torch.inf, dtype=x.dtype)
        self._numbers = torch.full_like(self._near, NOBODY, dtype=torch.long)

    @torch.no_grad()
    def add(self, rows: Float[Tensor, "N D"], numbers: Int[Tensor, " N"]) -> None:
        """Part of the bank, on the device of the queries. Numbers ascend; no two rows share one."""
        assert (numbers.diff() > 0).all(), "the numbers of a part ascend"
        with full_precision(rows.device):
            for start in range(0, len(rows), self.width):
                part = slice(start, start + self.width)
                self._group(rows[part], numbers[part])

    def found(self, *, gather: Gather | None = None) -> Nearest:
        """What is nearest of all that was added; where that is less than k, -inf and `NOBODY`.

        Args:
            gather: joins the first dimension over ranks (`contramask.distributed.gather`), where
                each has searched its part of the bank for the same queries. R ranks then hold
                12 R k bytes a query. None: what this rank has found.
        """
        near, numbers = self._near, self._numbers
        if gather is not None:
            every = [gather(part[None]).transpose(0, 1).flatten(1) for part in (near, numbers)]
            near, numbers = closest(*every, k=self.k)
        if self._squares is not None:  # only now: rounding could make equals of what is not
            near = (near - self._squares[:, None]).clamp(max=0)
        return Nearest(near, numbers)

    def _group(self, rows: Tensor, numbers: Tensor) -> None:
        bank, squares = self._prepared(rows)
        bank = F.pad(bank, (0, 0, 0, -len(bank) % self.columns))
        tile = bank.new_empty((self.rows, len(bank)))
        for start in range(0, len(self._near), self.rows):
            queries = self.queries[start : start + self.rows]
            for at in range(0, len(bank), self.columns):
                end = at + self.columns
                torch.mm(queries, bank[at:end].mT, out=tile[:, at:end])
            part = slice(start, min(start + self.rows, len(self._near)))
            near = tile[: part.stop - start, : len(rows)]
            if squares is not None:
                near.mul_(2).sub_(squares)  # |q|^2, the same for all rows, is left to `found`
            self._leave_out(near, part, numbers)
            values, places = _top(near, self.k)
            both = (
                torch.cat([self._near[part], values], 1),
                torch.cat([self._numbers[part], numbers[places]], 1),
            )
            self._near[part], self._numbers[part] = closest(*both, k=self.k)

    def _leave_out(self, near: Tensor, part: slice, numbers: Tensor) -> None:
        if self.own is None:
            return
        own = self.own[part]
        places = torch.searchsorted(numbers, own).clamp(max=len(numbers) - 1)
        here = (numbers[places] == own).nonzero()[:, 0]
        near[here, places[here]] = -torch.inf

    def _prepared(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows of which the metric makes inner products, and for `l2` their squared lengths."""
        x = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if self.metric == "cosine":
            return F.normalize(x, dim=1), None
        if self.metric == "dot":
            return x, None
        x = x if self.centre is None else x - self.centre
        return x, x.square().sum(1)


def bytes_held(
    queries: int, dim: int, k: int, device: torch.device, elements: int = 2**26, ranks: int = 1
) -> int:
    """The most that a `Search` holds beside the queries and the bank it is given, in float32.

    A tile of r = 256 queries by w = 16,384 rows (GPU: 2,048 by 16,384) and, where as many rows as
    that are equally near, its sorted values and places (20 r w); w rows in four copies (16 w D) and
    the candidates of a tile (120 r k); of the queries two copies (8 Q D) and what is found (12 Q k,
    of R ranks 36 R Q k). For 50,000 queries of 384 floats and k = 200 on a CPU 438 MiB.
    """
    rows, _, width = _tile(device, max(1, elements))
    padded = queries + rows
    shared = 36 * ranks * queries * k if ranks > 1 else 0
    tile = 20 * rows * width + 16 * width * dim + 120 * rows * k
    return tile + 8 * padded * dim + 12 * queries * k + shared


def closest(
    similarities: Float[Tensor, "Q c"], numbers: Int[Tensor, "Q c"], *, k: int
) -> tuple[Float[Tensor, "Q k"], Int[Tensor, "Q k"]]:
    """The k nearest of c candidates, nearest first, of equally near ones the lower number first."""
    numbers, order = numbers.sort(dim=1)
    similarities = similarities.gather(1, order)
    similarities, order = similarities.sort(dim=1, descending=True, stable=True)
    return similarities[:, :k], numbers.gather(1, order[:, :k])


def _top(near: Float[Tensor, "q n"], k: int) -> tuple[Float[Tensor, "q _"], Int[Tensor, "q _"]]:
    """The k largest of each row, or all; where the last is one of several equals, the first."""
    if k >= near.shape[1]:
        return near, torch.arange(near.shape[1], device=near.device).expand_as(near)
    values, places = near.topk(k + 1, dim=1)
    # topk takes any of equals. Only where the one behind the last is its equal does that matter.
    tied = (values[:, k - 1] == values[:, k]).nonzero()[:, 0]
    if len(tied):
        ordered = near[tied].sort(dim=1, descending=True, stable=True)
        values[tied, :k], places[tied, :k] = ordered.values[:, :k], ordered.indices[:, :k]
    return values[:, :k], places[:, :k]


def _tile(device: torch.device, elements: int) -> tuple[int, int, int]:
    """Queries and rows of one product, and rows of which the largest are looked for at once."""
    rows, columns, width = (2048, 16384, 16384) if device.type == "cuda" else (256, 2048, 16384)
    rows = min(rows, elements)
    columns = min(columns, elements // rows)
    return rows, columns, min(width, elements // rows) // columns * columns


@contextmanager
def full_precision(device: torch.device) -> Generator[None]:
    """Products of float32 are of float32: no autocast, no TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
