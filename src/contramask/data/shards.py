"""Shards as data sets for a DataLoader: the endless training stream, and one sweep over all.

webdataset takes the tars apart, one sample at a time: the index says where each begins, so a
damaged one costs itself alone, where a reader of whole tars would end the shard in silence. Only
members of the read suffixes are opened; nothing is decoded by webdataset, nothing unpickled.
"""

import io
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import webdataset.utils
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys, tar_file_expander

from contramask.data.blocks import Raw, Reader, Stream, fetch
from contramask.data.decode import BadImage
from contramask.data.faults import BadSample, Faults
from contramask.data.index_file import Index
from contramask.data.order import Layout
from contramask.data.shuffle import shuffled
from contramask.data.streaming import Streaming
from contramask.data.tarball import SUFFIXES, split_name
from contramask.errors import UserError
from contramask.types import fold

# No pickles and no shell commands, whatever the tars hold.
setattr(webdataset.utils, "enforce_security", True)  # noqa: B010  a variable without a stub

Item = TypeVar("Item")
Members = Mapping[str, bytes]  # suffix -> bytes
Decode = Callable[[Members, int], Item]  # the second is the sample's own seed
Collate = Callable[[list[Item]], dict[str, Any]]
_ATTEMPTS = 100  # to find a good sample in the place of a bad one
# What tarfile and webdataset raise on damaged archives.
DAMAGE = (tarfile.TarError, ValueError, OSError, EOFError)


def wanted(name: str) -> bool:
    """Whether a member is one of those that are read."""
    parts = split_name(name)
    return parts is not None and parts[1] in SUFFIXES


def samples(stream: Any, url: str) -> Iterator[dict[str, Any]]:
    """The samples of a tar that is read from its start: webdataset's dictionaries."""
    files = tar_file_expander([{"url": url, "stream": stream}], select_files=wanted)
    yield from group_by_keys(files)


def open_raw(raw: Raw) -> tuple[str, dict[str, bytes]]:
    """Key and members of a sample. Raises `BadSample`."""
    if not raw.whole:
        raise BadSample("truncated", f"{len(raw.data)} of {raw.shard.lengths[raw.sample]} bytes")
    try:
        found = list(samples(io.BytesIO(raw.data), raw.shard.url))
    except DAMAGE as error:
        raise BadSample("unreadable", said(error)) from None
    if len(found) != 1:
        raise BadSample("unreadable", f"{len(found)} samples where the index has one")
    return found[0]["__key__"], {k: v for k, v in found[0].items() if not k.startswith("__")}


class Decoder(Generic[Item]):
    """Members to items, with every fault counted under the sample's name.

    A `UserError` of `decode` is a mistake in all samples; it names the one that showed it.
    """

    def __init__(self, decode: Decode[Item], faults: Faults, *, seed: int) -> None:
        self.decode, self.faults, self.seed = decode, faults, seed

    def raw(self, raw: Raw, place: int) -> tuple[str, Item] | None:
        """Key and item of an indexed sample at a place of the stream; None if it is bad."""
        key = f"sample {raw.sample}"
        try:
            key, members = open_raw(raw)
            if raw.shard.labelled and "cls" not in members:
                raise BadSample("missing key", "no .cls")
            item = self.decode(members, fold(self.seed, "sample", place))
        except (BadSample, BadImage) as error:
            self.faults.bad(error.reason, f"{key} of {raw.shard.url}", str(error))
            return None
        except UserError as error:
            raise UserError(f"{key} of {raw.shard.url}: {error}") from None
        self.faults.good()
        return key, item

    def members(self, sample: Mapping[str, Any], place: int) -> tuple[str, Item] | None:
        """The same for a sample of `samples`."""
        members = {k: v for k, v in sample.items() if not k.startswith("__")}
        name = f"{sample['__key__']} of {sample['__url__']}"
        try:
            item = self.decode(members, fold(self.seed, "sample", place))
        except (BadSample, BadImage) as error:
            self.faults.bad(error.reason, name, str(error))
            return None
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        self.faults.good()
        return sample["__key__"], item


class ShardStream(IterableDataset[dict[str, Any]], Generic[Item]):
    """The micro-batches of one rank from an indexed training stream, for ever.

    Each is what `collate` makes of `layout.batch` items, with `position`, `keys` and `bad` (reason
    -> names of the bad samples met since this worker's last batch). A bad sample is replaced by
    another of its source, a function of the position and of nothing that was read before.

    Args:
        stream: the order of the samples.
        layout: the part of this rank and where it begins; passed in, for a worker that was not
            forked cannot ask torch.distributed.
        decode: (members by suffix, seed of the sample) -> item; raises `BadSample` or `BadImage`.
        collate: items -> batch.
        seed: of the samples' own seeds.
        streaming: `max_bad` and `grace`.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        layout: Layout,
        decode: Decode[Item],
        collate: Collate[Item],
        seed: int = 0,
        streaming: Streaming | None = None,
    ) -> None:
        self.stream, self.layout = stream, layout
        self.decode, self.collate = decode, collate
        self.seed, self.streaming = seed, streaming or Streaming()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker, workers = place_of_worker()
        settings = self.streaming
        faults = settings.faults(self.layout.world * workers)
        decoder = Decoder(self.decode, faults, seed=self.seed)
        starts = self.layout.positions(worker, workers)
        inside = np.arange(self.layout.batch, dtype=np.int64)
        with Reader(self.stream, self.layout, worker=worker, workers=workers) as reader:
            start = next(starts)
            while True:
                raw = reader.take(start + inside)
                following = next(starts)
                reader.ahead(following + inside)
                pairs = [self._one(decoder, r, start + i) for i, r in enumerate(raw)]
                yield finished(pairs, self.collate, position=start, bad=faults.take())
                start = following

    def _one(self, decoder: Decoder[Item], raw: Raw, position: int) -> tuple[str, Item]:
        for attempt in range(_ATTEMPTS):
            found = decoder.raw(raw, position)
            if found is not None:
                return found
            raw = self.stream.substitute(position, attempt)
        raise UserError(
            f"{_ATTEMPTS} samples in a row are bad, last {'; '.join(decoder.faults.last)}; check "
            "the shards with `contramask pack --check SHARDS --decode`"
        )


class ShardSweep(IterableDataset[dict[str, Any]], Generic[Item]):
    """Every sample of indexed shards exactly once over all ranks and workers, in a fixed order.

    Micro-batch m goes to rank m mod R; the last ones may be short or missing on some ranks. Bad
    samples are left out and counted.

    Args:
        index: the shards.
        layout: the part of this rank; the first `layout.start` places are left out.
        decode, collate, streaming: as in `ShardStream`.
        limit: the first so many of one seeded random order, None for all.
        seed: of that order: the same subset whatever the layout, a larger one holds a smaller.
    """

    def __init__(
        self,
        index: Index,
        *,
        layout: Layout,
        decode: Decode[Item],
        collate: Collate[Item],
        streaming: Streaming | None = None,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        self.index, self.layout = index, layout
        self.decode, self.collate = decode, collate
        self.streaming, self.limit, self.seed = streaming or Streaming(), limit, seed

    @property
    def count(self) -> int:
        """How many samples there are over all ranks."""
        return self.index.samples if self.limit is None else min(self.limit, self.index.samples)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker, workers = place_of_worker()
        faults = self.streaming.faults(self.layout.world * workers)
        decoder = Decoder(self.decode, faults, seed=self.seed)
        order = np.arange(self.index.samples, dtype=np.int64)
        if self.limit is not None:
            order = np.sort(shuffled(len(order), fold(self.seed, "subset"))[: self.limit])
        step = self.layout.world * workers * self.layout.batch
        first = (worker * self.layout.world + self.layout.rank) * self.layout.batch
        for start in range(self.layout.start + first, len(order), step):
            raw = fetch(self._find(order[start : start + self.layout.batch]))
            found = (decoder.raw(r, start + i) for i, r in enumerate(raw))
            pairs = [pair for pair in found if pair is not None]
            if pairs:
                yield finished(pairs, self.collate, position=start, bad=faults.take())

    def _find(self, order: np.ndarray) -> list[Any]:
        ends = np.cumsum(self.index.counts)
        shards = np.searchsorted(ends, order, side="right")
        inside = order - ends[shards] + self.index.counts[shards]
        return [(self.index.shards[i], int(k)) for i, k in zip(shards, inside, strict=True)]


def finished(
    pairs: Sequence[tuple[str, Item]],
    collate: Collate[Item],
    *,
    position: int,
    bad: dict[str, list[str]],
) -> dict[str, Any]:
    """A batch with its place, its names and the faults met on the way."""
    batch = collate([item for _, item in pairs])
    return batch | {"position": position, "keys": [key for key, _ in pairs], "bad": bad}


def said(error: Exception) -> str:
    """The message of tarfile or webdataset, without the file objects webdataset adds to it."""
    return f"{type(error).__name__}: {str(error.args[0]).split(' @ <')[0]}"


def place_of_worker() -> tuple[int, int]:
    """Number of this worker, of how many; 0 of 1 in the main process."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
