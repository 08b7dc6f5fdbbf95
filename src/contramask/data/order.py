"""The order of the endless training stream, in closed form: (seed, position) -> sample. No I/O.

An epoch lays all samples of the shards in a circle, shards in an order of its own, enters the
circle at a place of its own, and cuts it into S equal streams; what does not fill whole units of
all streams (fewer than S * U samples, others in each epoch) is left out. A stream is cut into
blocks of K samples, each shuffled. Position p of the endless stream lies in unit p // U, which
belongs to stream (p // U) mod S: U samples of one stream follow one another, then U of the next.

Nothing depends on ranks, workers or what was read before, so a run may stop anywhere and go on
with any number of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from contramask.data.shuffle import shuffled
from contramask.errors import UserError
from contramask.types import fold

Ints = Int64[ndarray, "..."]
# An epoch leaves out less than one sample in this many: units and streams shrink until it is so.
_WASTE = 64


class Block(NamedTuple):
    """Neighbouring samples of one stream of an epoch, shuffled among each other."""

    epoch: int
    stream: int
    number: int


class Samples(NamedTuple):
    """Where samples are, arrays of one shape: the shard in its source, the sample in the shard."""

    shard: Ints
    sample: Ints


class Order:
    """The order of one source of `counts[i]` samples in shard i.

    `unit`, `streams` and `block` are those of `Streaming`; units and streams shrink for small data
    sets, as a function of the number of samples and these settings only.
    """

    def __init__(
        self, counts: Ints, *, seed: int, unit: int, streams: int = 32, block: int = 1024
    ) -> None:
        self.counts, self.seed = counts, seed
        self.total = int(counts.sum())
        if self.total < 1:
            raise UserError("the shards hold no samples; data.train must name shards with images")
        few = max(1, self.total // _WASTE)
        self.unit = max(d for d in range(1, min(unit, few) + 1) if unit % d == 0)
        self.streams = min(streams, max(1, few // self.unit))
        if self.streams < streams:  # a power of two meets most numbers of readers
            self.streams = 1 << (self.streams.bit_length() - 1)
        self.block = max(1, block // self.unit) * self.unit
        self.length = self.total // self.streams // self.unit * self.unit  # of a stream, an epoch
        self._plans: dict[int, tuple[Ints, Ints, int]] = {}

    @property
    def epoch_samples(self) -> int:
        """Samples an epoch visits, each once: all but fewer than streams * unit."""
        return self.streams * self.length

    def blocks(self, places: Ints) -> list[tuple[Block, Ints]]:
        """The blocks in which places of this source's stream lie -> indices into `places`."""
        epoch, stream, row = self._cut(places)
        number = (row + self._phase(stream)) // self.block
        keys = np.stack([epoch, stream, number], axis=1)
        found, which = np.unique(keys, axis=0, return_inverse=True)
        which = which.reshape(-1)
        return [(Block(*map(int, key)), np.flatnonzero(which == i)) for i, key in enumerate(found)]

    def samples(self, places: Ints) -> Samples:
        """The samples at places 0, 1, ... of this source's endless stream."""
        shard, sample = np.empty_like(places), np.empty_like(places)
        for block, at in self.blocks(places):
            _, _, row = self._cut(places[at])
            low, high = self._bounds(block)
            mixed = shuffled(high - low, fold(self.seed, *block))
            shard[at], sample[at] = self._locate(block, low + mixed[row - low])
        return Samples(shard, sample)

    def places(self, block: Block) -> Int64[ndarray, " places"]:
        """The places at which the endless stream visits a block, ascending."""
        row = np.arange(*self._bounds(block), dtype=np.int64)
        line, inside = np.divmod(row, self.unit)
        unit = (block.epoch * (self.length // self.unit) + line) * self.streams + block.stream
        return unit * self.unit + inside

    def substitute(self, place: int, attempt: int) -> Samples:
        """The sample that takes the place of a bad one: drawn from all, anew at each attempt."""
        drawn = fold(self.seed, "substitute", place, attempt) % self.total
        epoch = place // self.epoch_samples
        shard, sample = self._locate(Block(epoch, 0, 0), np.array([drawn], dtype=np.int64))
        return Samples(shard, sample)

    def _cut(self, places: Ints) -> tuple[Ints, Ints, Ints]:
        """Places of the endless stream -> epoch, stream, place in the stream."""
        unit, inside = np.divmod(places, self.unit)
        line, stream = np.divmod(unit, self.streams)
        epoch, line = np.divmod(line, self.length // self.unit)
        return epoch, stream, line * self.unit + inside

    def _phase(self, stream: Ints | int) -> Ints | int:
        """How much shorter a stream's first block is: not all streams end a block at once."""
        return stream * (self.block // self.unit) // self.streams * self.unit  # whole units

    def _bounds(self, block: Block) -> tuple[int, int]:
        start = block.number * self.block - int(self._phase(block.stream))
        return max(0, start), min(self.length, start + self.block)

    def _locate(self, block: Block, row: Ints) -> Samples:
        """Places in a stream before the shuffle of blocks -> samples."""
        shards, ends, entry = self._plan(block.epoch)
        around = (entry + block.stream * self.length + row) % self.total
        at = np.searchsorted(ends, around, side="right")
        return Samples(shards[at], around - ends[at] + self.counts[shards[at]])

    def _plan(self, epoch: int) -> tuple[Ints, Ints, int]:
        """The shards of an epoch in their order, where each ends in the circle, the entry."""
        if epoch not in self._plans:
            if len(self._plans) > 3:
                self._plans.pop(min(self._plans))
            shards = shuffled(len(self.counts), fold(self.seed, epoch, "shards"))
            entry = fold(self.seed, epoch, "entry") % self.total
            self._plans[epoch] = shards, np.cumsum(self.counts[shards]), entry
        return self._plans[epoch]


class Mixture:
    """Which source each position of the stream draws from: exact quotas in every period.

    A period of `SLOTS` positions gives each source its share (rounded by largest remainders), in
    a seeded order of its own.
    """

    SLOTS = 1000

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        self.seed = seed
        share = np.array(weights, dtype=np.float64) / np.sum(weights) * self.SLOTS
        self.quotas = np.floor(share).astype(np.int64)
        rest = np.argsort(self.quotas - share, kind="stable")[: self.SLOTS - self.quotas.sum()]
        self.quotas[rest] += 1
        if (self.quotas == 0).any():
            raise UserError(
                f"data.train: weights {list(weights)} give a source less than 1/{self.SLOTS} of "
                "the stream; give it more, or leave it out"
            )

    def split(self, positions: Ints) -> tuple[Ints, Ints]:
        """Positions of the stream -> source, place in that source's own endless stream."""
        source, place = np.zeros_like(positions), positions.copy()
        if len(self.quotas) == 1:
            return source, place
        period, slot = np.divmod(positions, self.SLOTS)
        for one in np.unique(period):
            at = period == one
            pattern, rank = self._pattern(int(one))
            source[at] = pattern[slot[at]]
            place[at] = one * self.quotas[source[at]] + rank[slot[at]]
        return source, place

    def join(self, source: int, places: Ints) -> Ints:
        """The inverse of `split` for one source."""
        if len(self.quotas) == 1:
            return places
        period, nth = np.divmod(places, self.quotas[source])
        positions = np.empty_like(places)
        for one in np.unique(period):
            at = period == one
            slots = np.flatnonzero(self._pattern(int(one))[0] == source)
            positions[at] = one * self.SLOTS + slots[nth[at]]
        return positions

    def _pattern(self, period: int) -> tuple[Ints, Ints]:
        """Source of each slot, and how many slots of that source come before it."""
        kinds = np.repeat(np.arange(len(self.quotas)), self.quotas)
        mixed = shuffled(self.SLOTS, fold(self.seed, "mixture", period))
        pattern, rank = kinds[mixed], np.empty(self.SLOTS, dtype=np.int64)
        for source, quota in enumerate(self.quotas):
            rank[pattern == source] = np.arange(quota)
        return pattern, rank


@dataclass(frozen=True)
class Layout:
    """Who takes which micro-batch.

    Rank r's k-th begins at position start + (k * world + r) * batch; worker w of W takes k = w,
    w + W, ... No relation between streams and readers is demanded; the
    least is read where ranks * workers divides the number of streams.
    """

    batch: int  # images of a micro-batch
    rank: int = 0
    world: int = 1
    start: int = 0  # images the stream has given to all ranks so far

    def positions(self, worker: int = 0, workers: int = 1) -> Iterator[int]:
        """The first positions of this worker's micro-batches, for ever."""
        turn = worker
        while True:
            yield self.start + (turn * self.world + self.rank) * self.batch
            turn += workers

    def mine(self, positions: Ints, worker: int = 0, workers: int = 1) -> ndarray:
        """Which positions this worker is still to read, as a boolean mask."""
        number = (positions - self.start) // self.batch
        turn, rank = np.divmod(number, self.world)
        return (positions >= self.start) & (rank == self.rank) & (turn % workers == worker)
