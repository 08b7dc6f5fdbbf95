"""Streaming without an index: whole shards from their start, in an order of seed and epoch.

What is lost against an index: every reader (rank x worker) needs shards of its own; a resume reads
and drops what was seen, and is exact only with the same numbers of ranks and workers; a shard that
was cut at a member's boundary is shorter and nobody knows; mixtures are not offered.
`contramask pack index` lifts all of this.
"""

import logging
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any, Generic

from torch.utils.data import IterableDataset

from contramask.data import storage
from contramask.data.faults import Faults
from contramask.data.order import Layout
from contramask.data.shards import (
    DAMAGE,
    Collate,
    Decode,
    Decoder,
    Item,
    finished,
    place_of_worker,
    said,
    samples,
)
from contramask.data.shuffle import shuffled
from contramask.data.streaming import Streaming
from contramask.errors import UserError
from contramask.types import fold

log = logging.getLogger(__name__)
Sample = dict[str, Any]


def read_through(urls: Sequence[str], faults: Faults) -> Iterator[Sample]:
    """All samples of shards, one after the other; a damaged shard counts and is left."""
    for url in urls:
        try:
            with storage.open_stream(url) as stream:
                yield from samples(stream, url)
        except FileNotFoundError as error:
            raise UserError(f"{url} is missing ({error}); restore it, then go on") from None
        except DAMAGE as error:
            faults.bad("unreadable", url, said(error))


class SequentialStream(IterableDataset[dict[str, Any]], Generic[Item]):
    """The micro-batches of one rank from shards without an index, for ever.

    Epoch e gives its shards, in an order of (seed, e), to ranks x workers in turn; each reader
    shuffles every `streaming.block` samples (and holds as many, compressed), across the ends of
    shards and epochs, so every rank has batches without end. A bad sample is replaced by the next
    good one of its block. Arguments as of `ShardStream`.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        layout: Layout,
        decode: Decode[Item],
        collate: Collate[Item],
        seed: int = 0,
        streaming: Streaming | None = None,
    ) -> None:
        self.urls, self.layout = tuple(urls), layout
        self.decode, self.collate = decode, collate
        self.seed, self.streaming = seed, streaming or Streaming()
        if layout.start % (layout.batch * layout.world):
            raise UserError(
                f"without an index training cannot go on at image {layout.start} with "
                f"{layout.world} ranks of {layout.batch}; keep the numbers the run began with, or "
                "run `contramask pack index`"
            )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker, workers = place_of_worker()
        layout, settings = self.layout, self.streaming
        readers = layout.world * workers
        if len(self.urls) < readers:
            raise UserError(
                f"{len(self.urls)} shards without an index cannot feed {readers} readers "
                f"({layout.world} ranks of {workers} workers); run `contramask pack index` over "
                "them (then any number will do), or set data.workers lower"
            )
        done = layout.start // (layout.batch * layout.world)
        lane = (done + worker) % workers  # so that worker 0 has the batch that is next
        skip = -(-(done - lane) // workers) * layout.batch
        faults = settings.faults(readers)
        decoder = Decoder(self.decode, faults, seed=self.seed)
        slots = self._slots(lane * layout.world + layout.rank, readers, skip, faults)
        for start in layout.positions(worker, workers):
            pairs = [
                self._one(decoder, *slot, start + i)
                for i, slot in enumerate(islice(slots, layout.batch))
            ]
            yield finished(pairs, self.collate, position=start, bad=faults.take())

    def _slots(
        self, reader: int, readers: int, skip: int, faults: Faults
    ) -> Iterator[tuple[list[Sample], int]]:
        """Shuffled blocks and the place in them of the next samples, without the first `skip`."""
        endless = self._endless(reader, readers, faults)
        for number in count():
            block = list(islice(endless, self.streaming.block))
            if skip >= len(block):
                skip -= len(block)
                continue
            mixed = shuffled(len(block), fold(self.seed, "block", reader, number))
            block = [block[i] for i in mixed]
            yield from ((block, at) for at in range(skip, len(block)))
            skip = 0

    def _endless(self, reader: int, readers: int, faults: Faults) -> Iterator[Sample]:
        for epoch in count():
            order = shuffled(len(self.urls), fold(self.seed, epoch, "shards"))[reader::readers]
            found = 0
            for sample in read_through([self.urls[i] for i in order], faults):
                found += 1
                yield sample
            if not found:
                names = ", ".join(self.urls[i] for i in order[:3])
                said = f" ({'; '.join(faults.last)})" if faults.last else ""
                raise UserError(
                    f"no samples in {names}{said}; shards are tars of KEY.jpg and KEY.cls members: "
                    "see what is wrong by `contramask pack --check`, or correct data.train"
                )

    def _one(
        self, decoder: Decoder[Item], block: list[Sample], at: int, position: int
    ) -> tuple[str, Item]:
        for step in range(len(block)):
            pair = decoder.members(block[(at + step) % len(block)], position)
            if pair is not None:
                return pair
        raise UserError(
            f"all {len(block)} samples of a block are bad, last {'; '.join(decoder.faults.last)}"
        )


class SequentialSweep(IterableDataset[dict[str, Any]], Generic[Item]):
    """Every sample of shards without an index once over all ranks and workers.

    Reader i of n takes shards i, i + n, ...; with `limit`, each reader its share of so many first
    ones. A batch ends with its shard, and `position` is the shard's number times 2^32 and the place
    in it, so that places do not depend on the readers. Arguments as of `ShardSweep`.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        layout: Layout,
        decode: Decode[Item],
        collate: Collate[Item],
        streaming: Streaming | None = None,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        self.urls, self.layout = tuple(urls), layout
        self.decode, self.collate = decode, collate
        self.streaming, self.limit, self.seed = streaming or Streaming(), limit, seed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker, workers = place_of_worker()
        reader, readers = worker * self.layout.world + self.layout.rank, self.layout.world * workers
        share = None if self.limit is None else len(range(reader, self.limit, readers))
        faults = self.streaming.faults(readers)
        decoder = Decoder(self.decode, faults, seed=self.seed)
        for number in range(reader, len(self.urls), readers):
            found = islice(read_through([self.urls[number]], faults), share)
            for start in count(number << 32, self.layout.batch):
                some = list(islice(found, self.layout.batch))
                if not some:
                    break
                share = None if share is None else share - len(some)
                tried = (decoder.members(sample, start + i) for i, sample in enumerate(some))
                pairs = [pair for pair in tried if pair is not None]
                if pairs:
                    yield finished(pairs, self.collate, position=start, bad=faults.take())
