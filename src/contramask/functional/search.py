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

# Queries with equally near rows that are looked after at once.
TIED = 64

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
                each has searched its part of the bank for the same queries. None: what this rank
                has found.
        """
        near, numbers = torch.empty_like(self._near), torch.empty_like(self._numbers)
        for start in range(0, len(near), self.rows):
            part = slice(start, start + self.rows)
            every = self._near[part], self._numbers[part]
            if gather is not None:
                every = [gather(mine[None]).transpose(0, 1).flatten(1) for mine in every]
            near[part], numbers[part] = closest(*every, k=self.k)
        if self._squares is not None:  # only now: rounding could make equals of what is not
            near = near.sub_(self._squares[:, None]).clamp_(max=0)
        return Nearest(near, numbers)

    def _group(self, rows: Tensor, numbers: Tensor) -> None:
        bank, squares = self._prepared(rows)
        bank = F.pad(bank, (0, 0, 0, -len(bank) % self.columns))
        # In front of the products stands what is found so far. `topk` begins with the first k: few
        # of the others then ever enter its heap, and what it finds is merged.
        front = self.k + -self.k % 16
        tile = bank.new_empty((self.rows, front + len(bank)))
        for start in range(0, len(self._near), self.rows):
            queries = self.queries[start : start + self.rows]
            for at in range(0, len(bank), self.columns):
                end = at + self.columns
                torch.mm(queries, bank[at:end].mT, out=tile[:, front + at : front + end])
            part = slice(start, min(start + self.rows, len(self._near)))
            near = tile[: part.stop - start, front : front + len(rows)]
            if squares is not None:
                near.mul_(2).sub_(squares)  # |q|^2, the same for all rows, is left to `found`
            self._leave_out(near, part, numbers)
            near = tile[: part.stop - start, front - self.k : front + len(rows)]
            near[:, : self.k] = self._near[part]
            self._near[part], self._numbers[part] = _top(near, self._numbers[part], numbers)

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

    A tile of r = 256 queries by w = 32,768 rows (GPU: 2,048 by 16,384), 4 r (w + k); what looks
    after 64 of its queries where too many rows are equally near, 1024 (w + k); w prepared rows,
    12 w D; the candidates of a tile, of R ranks 160 R r k; the queries, prepared and padded,
    8 (Q + r) D; and what is found, 24 Q k. For 50,000 queries of 384 floats and k = 200 on a CPU
    592 MiB.
    """
    rows, _, width = _tile(device, max(1, elements))
    wide, padded = width + k, queries + rows
    tile = (4 * rows + 16 * TIED) * wide + 12 * width * dim + 160 * ranks * rows * k
    return tile + 8 * padded * dim + 24 * queries * k


def closest(
    similarities: Float[Tensor, "Q c"], numbers: Int[Tensor, "Q c"], *, k: int
) -> tuple[Float[Tensor, "Q k"], Int[Tensor, "Q k"]]:
    """The k nearest of c candidates, nearest first, of equally near ones the lower number first."""
    numbers, order = numbers.sort(dim=1)
    similarities = similarities.gather(1, order)
    similarities, order = similarities.sort(dim=1, descending=True, stable=True)
    return similarities[:, :k], numbers.gather(1, order[:, :k])


def _top(
    near: Float[Tensor, "q kn"], before: Int[Tensor, "q k"], numbers: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """The k largest of each row, in any order; where the last has equals, those of low numbers.

    Args:
        near: of k neighbours that were found before, then of n rows.
        before: the numbers of those.
        numbers: of these.
    """
    k, n = before.shape[1], len(numbers)
    values, places = near.topk(k + 1, dim=1)
    # Numbers of one after the other, without a table of them all.
    old = before.gather(1, places.clamp(max=k - 1))
    found = torch.where(places < k, old, numbers[(places - k).clamp(min=0, max=n - 1)])
    # topk takes any of equals. Only where the one behind the last is its equal does that matter.
    tied = (values[:, k - 1] == values[:, k]).nonzero()[:, 0]
    for some in tied.split(TIED):
        group = near[some, k:]
        first = _first(group, values[some, k - 1 : k], k)
        values[some, :k], found[some, :k] = closest(
            torch.cat([near[some, :k], group.gather(1, first)], 1),
            torch.cat([before[some], numbers[first]], 1),
            k=k,
        )
    return values[:, :k], found[:, :k]


def _first(near: Float[Tensor, "q n"], last: Float[Tensor, "q 1"], k: int) -> Int[Tensor, "q _"]:
    """Where k rows are of which fewer are above `last`: all these and the first that equal it."""
    n = near.shape[1]
    early = torch.arange(n, 0, -1, dtype=near.dtype, device=near.device) / (2 * n)
    rated = torch.where(near == last, early, (near > last).to(near.dtype))
    return rated.topk(min(k, n), dim=1).indices


def _tile(device: torch.device, elements: int) -> tuple[int, int, int]:
    """Queries and rows of one product, and rows of which the largest are looked for at once."""
    rows, columns, width = (2048, 16384, 16384) if device.type == "cuda" else (256, 2048, 32768)
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
