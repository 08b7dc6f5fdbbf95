"""The shards of one split: their sources, their indexes if they have any, what is in them."""

from dataclasses import dataclass

from contramask.data.blocks import Stream
from contramask.data.index import check_shards, classes_of, load_index
from contramask.data.index_file import Index
from contramask.data.order import Mixture, Order
from contramask.data.sources import Source, sources
from contramask.data.streaming import Streaming
from contramask.errors import UserError
from contramask.types import fold

NO_INDEX = (
    "data.train: %s has no index: it is streamed shard by shard, and a resume reads it from the "
    "start; `contramask pack index` makes one"
)


@dataclass(frozen=True, eq=False)
class ShardSet:
    """What a setting such as `data.train` names, found and checked."""

    sources: tuple[Source, ...]
    indexes: tuple[Index, ...] | None  # one for each source; None: there are none

    @property
    def urls(self) -> list[str]:
        """The addresses of all shards."""
        return [url for source in self.sources for url in source.shards]

    @property
    def index(self) -> Index | None:
        """One index of all sources."""
        if self.indexes is None:
            return None
        return Index(tuple(shard for index in self.indexes for shard in index.shards))

    @property
    def samples(self) -> int | None:
        """How many samples there are; None without an index."""
        return None if self.index is None else self.index.samples

    def stream(self, *, seed: int, unit: int, streaming: Streaming) -> Stream:
        """The endless training stream. Needs an index."""
        assert self.indexes is not None
        alone = len(self.sources) == 1
        orders = [
            Order(
                index.counts,
                # By its place and not by its name: files may move to another folder.
                seed=seed if alone else fold(seed, "source", number),
                unit=unit,
                streams=streaming.streams,
                block=streaming.block,
            )
            for number, index in enumerate(self.indexes)
        ]
        mixture = Mixture([source.weight for source in self.sources], seed=seed)
        return Stream(self.indexes, orders, mixture)


def find_shards(
    spec: str | list[str] | dict[str, float], *, streaming: Streaming, where: str
) -> ShardSet:
    """The shards a setting names, checked against their indexes.

    Raises `UserError` when none match, when a shard is missing or not as its index says, and when
    sources are mixed of which one has no index.
    """
    found = tuple(sources(spec, allow_pipe=streaming.allow_pipe, where=where))
    indexes = [load_index(source.shards, file=streaming.index) for source in found]
    known = [index for index in indexes if index is not None]
    if len(known) == len(found):
        for index in known:
            check_shards(index)
        return ShardSet(found, tuple(known))
    bare = [source.name for source, index in zip(found, indexes, strict=True) if index is None]
    if len(found) > 1:
        raise UserError(
            f"{where} mixes sources, and {bare[0]} has no index; run `contramask pack index` on it"
        )
    return ShardSet(found, None)


def classes_in(sets: list[ShardSet]) -> int:
    """How many classes the labels tell apart: by `classes.json`, else by the indexes; 0: none."""
    names = classes_of(url for one in sets for url in one.urls if not url.startswith("pipe:"))
    if names is not None:
        return len(names)
    return max((one.index.labels for one in sets if one.index is not None), default=0)
