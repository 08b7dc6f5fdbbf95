"""Streams of numbered samples for tests, and what they should give by the closed form alone."""

import tarfile
from contextlib import closing
from itertools import islice

import numpy as np

from contramask.data import shards
from contramask.data.blocks import Stream
from contramask.data.index import build_index
from contramask.data.loader import Loader
from contramask.data.order import Layout, Mixture, Order
from contramask.data.shards import ShardStream
from contramask.data.streaming import Streaming
from tests.data.tars import number, numbered_shards, numbers

COUNTS = [160, 1, 300, 240, 133, 360, 210, 196]  # 1600 samples
SMALL = {"seed": 5, "unit": 6, "streams": 4, "block": 24}


def stream_of(index, **settings) -> Stream:
    return Stream([index], [Order(index.counts, **(SMALL | settings))], Mixture([1.0], seed=0))


def shard_stream(stream, *, decode=number, collate=numbers, **kwargs) -> ShardStream:
    settings = {name: kwargs.pop(name) for name in ("max_bad", "grace") if name in kwargs}
    layout = Layout(kwargs.pop("batch", 12), **kwargs)
    shared = {"decode": decode, "collate": collate, "streaming": Streaming(**settings)}
    return ShardStream(stream, layout=layout, seed=9, **shared)


def loaded(make, workers: int, count: int) -> list[dict]:
    """The first batches as a DataLoader gives them."""
    batches = iter(Loader(lambda: make, workers=workers, streaming=Streaming()))
    with closing(batches):
        return list(islice(batches, count))


def as_worker(monkeypatch, worker: int, workers: int) -> None:
    """Makes the data sets believe that they run in this worker."""
    monkeypatch.setattr(shards, "place_of_worker", lambda: (worker, workers))


def expected(stream: Stream, start: int, count: int) -> list[int]:
    """Numbers of samples from the closed form alone."""
    shard, sample = stream.orders[0].samples(np.arange(start, start + count))
    firsts = np.concatenate([[0], np.cumsum(stream.indexes[0].counts)])
    return (firsts[shard] + sample).tolist()


JPG, CLS = "s00030.jpg", "s00030.cls"  # of the second shard below


def header(path, name):
    with tarfile.open(path) as tar:
        return tar.getmember(name).offset


def overwrite(path, at, data):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def one_bad_shard(tmp_path, damage):
    """Three shards of 20, the second damaged after it was indexed."""
    urls = numbered_shards(tmp_path, [20, 20, 20])
    index = build_index(urls)
    damage(urls[1])
    return index


def bad_of(batches) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for batch in batches:
        for reason, names in batch["bad"].items():
            found.setdefault(reason, set()).update(names)
    return found
