"""The raw bytes of the samples one worker will need, read block by block, one batch ahead.

A worker reads of a block only the samples that fall to it, in ascending order, neighbours at once.
It holds the blocks its current batch draws from until their last sample is used, and those of the
next batch, which one background thread reads meanwhile. All workers of all ranks together hold at
most `streams * block` samples of the blocks in use, and the next batch's blocks besides.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from contramask.data import storage
from contramask.data.index_file import Index
from contramask.data.order import Block, Ints, Layout, Mixture, Order
from contramask.data.storage import Span
from contramask.data.tarball import Shard
from contramask.errors import UserError


class Raw(NamedTuple):
    """A sample as it lies in its shard: a piece of tar. It may be too short."""

    shard: Shard
    sample: int
    data: bytes

    @property
    def whole(self) -> bool:
        """Whether all its bytes were there."""
        return len(self.data) == int(self.shard.lengths[self.sample])


@dataclass(frozen=True, eq=False)
class Stream:
    """The training stream over indexed shards: position -> sample, for one source or a mixture."""

    indexes: Sequence[Index]
    orders: Sequence[Order]
    mixture: Mixture

    def blocks(self, positions: Ints) -> dict[tuple[int, Block], Ints]:
        """The blocks that positions draw from, in order of the first use -> these positions."""
        source, place = self.mixture.split(positions)
        found = {}
        for one in np.unique(source):
            mine = np.flatnonzero(source == one)
            for block, at in self.orders[one].blocks(place[mine]):
                found[int(one), block] = positions[mine[at]]
        return dict(sorted(found.items(), key=lambda item: item[1][0]))

    def positions(self, source: int, block: Block) -> Ints:
        """All positions that draw from a block, ascending."""
        return self.mixture.join(source, self.orders[source].places(block))

    def find(self, source: int, positions: Ints) -> list[tuple[Shard, int]]:
        """The samples of positions that belong to this source."""
        _, place = self.mixture.split(positions)
        shards, samples = self.orders[source].samples(place)
        known = self.indexes[source].shards
        return [(known[i], int(k)) for i, k in zip(shards, samples, strict=True)]

    def substitute(self, position: int, attempt: int) -> Raw:
        """Another sample for a bad one, from the same source: a function of the place alone."""
        source, place = self.mixture.split(np.array([position], dtype=np.int64))
        order = self.orders[int(source[0])]
        shards, samples = order.substitute(int(place[0]), attempt)
        shard = self.indexes[int(source[0])].shards[int(shards[0])]
        return fetch([(shard, int(samples[0]))])[0]


def fetch(wanted: Sequence[tuple[Shard, int]]) -> list[Raw]:
    """Reads samples, each shard once and in ascending order. Raises `UserError` if it cannot."""
    parts: list[Raw | None] = [None] * len(wanted)
    by_shard: dict[str, list[int]] = {}
    for i, (shard, _) in enumerate(wanted):
        by_shard.setdefault(shard.url, []).append(i)
    for url, at in by_shard.items():
        shard, places = wanted[at[0]][0], [wanted[i][1] for i in at]
        spans = [Span(int(shard.starts[k]), int(shard.lengths[k])) for k in places]
        try:
            found = storage.read(url, spans)
        except OSError as error:
            raise UserError(
                f"{url} could be read when training started and cannot now ({error}); restore it "
                "and resume"
            ) from error
        for i, data in zip(at, found, strict=True):
            parts[i] = Raw(shard, wanted[i][1], data)
    return [part for part in parts if part is not None]


class Reader:
    """Gives a worker the raw samples of its batches; a context, for its background thread."""

    def __init__(self, stream: Stream, layout: Layout, *, worker: int, workers: int) -> None:
        self.stream, self.layout = stream, layout
        self.worker, self.workers = worker, workers
        self.loading: dict[tuple[int, Block], Future[dict[int, Raw]]] = {}
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

    def take(self, positions: Ints) -> list[Raw]:
        """The samples at these positions. Each position can be taken once."""
        found: dict[int, Raw] = {}
        for key, some in self.stream.blocks(positions).items():
            samples = self._begin(key).result()
            found |= {p: samples.pop(p) for p in some.tolist()}
            if not samples:
                del self.loading[key]
        return [found[p] for p in positions.tolist()]

    def ahead(self, positions: Ints) -> None:
        """Begins to read what these positions need."""
        for key in self.stream.blocks(positions):
            self._begin(key)

    def _begin(self, key: tuple[int, Block]) -> Future[dict[int, Raw]]:
        if key not in self.loading:
            self.loading[key] = self.pool.submit(self._load, *key)
        return self.loading[key]

    def _load(self, source: int, block: Block) -> dict[int, Raw]:
        positions = self.stream.positions(source, block)
        mine = positions[self.layout.mine(positions, self.worker, self.workers)]
        raw = fetch(self.stream.find(source, mine))
        return dict(zip(mine.tolist(), raw, strict=True))
