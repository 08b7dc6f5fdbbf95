from contextlib import closing
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contramask.data import blocks
from contramask.data.blocks import Reader, Stream
from contramask.data.index import build_index
from contramask.data.loader import Loader
from contramask.data.order import Layout, Mixture, Order
from contramask.data.streaming import Streaming
from contramask.types import fold
from tests.data.streams import SMALL, as_worker, expected, loaded, shard_stream, stream_of
from tests.data.tars import numbered_shards


@pytest.mark.parametrize(
    ("world", "workers"),
    [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (3, 4), (5, 2), (16, 1), (16, 4)],
)
def test_the_order_is_the_same_for_every_layout(stream, monkeypatch, world, workers):
    rounds = -(-150 // (world * workers))
    batches = []
    for rank in range(world):
        for worker in range(workers):
            as_worker(monkeypatch, worker, workers)
            data = shard_stream(stream, rank=rank, world=world)
            batches += islice(data, rounds)
    batches.sort(key=lambda batch: batch["position"])
    assert [b["position"] for b in batches] == [12 * i for i in range(len(batches))]
    assert [n for b in batches for n in b["numbers"]] == expected(stream, 0, 12 * len(batches))
    seeds = [k for b in batches for k in b["seeds"]]
    assert seeds == [fold(9, "sample", p) for p in range(len(seeds))]
    assert all(b["bad"] == {} for b in batches)
    assert batches[0]["keys"] == [f"s{n:05d}" for n in batches[0]["numbers"]]


@pytest.mark.parametrize("unit", [1, 2, 3, 6])
def test_units_keep_the_order_when_the_batch_changes(index, unit):
    some = stream_of(index, unit=unit)
    orders = []
    for batch in (6, 12, 30):
        data = shard_stream(some, batch=batch)
        orders.append([n for b in islice(data, 60 // batch * 2) for n in b["numbers"]])
    assert orders[0] == orders[1] == orders[2] == expected(some, 0, 120)


@given(
    start=st.integers(0, 80).map(lambda k: k * 12),
    world=st.integers(1, 7),
    workers=st.integers(1, 4),
)
@settings(max_examples=25)
def test_resume_anywhere_with_any_layout(stream, start, world, workers):
    with pytest.MonkeyPatch.context() as patch:
        for rank in (0, world - 1):
            for worker in (0, workers - 1):
                as_worker(patch, worker, workers)
                data = shard_stream(stream, rank=rank, world=world, start=start)
                batch = list(islice(data, 2))[1]
                position = start + ((worker + workers) * world + rank) * 12
                assert batch["position"] == position
                assert batch["numbers"] == expected(stream, position, 12)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_through_a_real_loader(stream, workers):
    straight = loaded(shard_stream(stream), workers, 42)
    assert [b["position"] for b in straight] == [12 * i for i in range(42)]
    for stop in (1, 17, 33):
        resumed = loaded(shard_stream(stream, start=12 * stop), workers, 4)
        assert resumed == straight[stop : stop + 4]


def test_a_start_inside_a_unit_works_too(stream):
    batch = next(iter(shard_stream(stream, start=7)))
    assert batch["numbers"] == expected(stream, 7, 12)


def test_an_epoch_has_each_sample_at_most_once(stream):
    size = stream.orders[0].epoch_samples
    assert size == 1584  # 66 units of 4 streams
    seen = [n for b in islice(shard_stream(stream), 264) for n in b["numbers"]]
    for epoch in range(2):
        part = seen[epoch * size : (epoch + 1) * size]
        assert len(set(part)) == size


def test_spawned_workers_know_their_rank(stream):
    settings = Streaming(context="spawn")
    data = shard_stream(stream, rank=1, world=2)
    with closing(iter(Loader(lambda: data, workers=1, streaming=settings))) as batches:
        first = next(batches)
    assert first["position"] == 12
    assert first["numbers"] == expected(stream, 12, 12)


def test_few_samples_and_many_readers(tmp_path, monkeypatch):
    small = build_index(numbered_shards(tmp_path, [3, 4]))
    some = stream_of(small, unit=4)
    seen = []
    for rank in range(4):
        for worker in range(2):
            as_worker(monkeypatch, worker, 2)
            batch = next(iter(shard_stream(some, batch=4, rank=rank, world=4)))
            seen.append((batch["position"], batch["numbers"]))
    assert [n for _, some in sorted(seen) for n in some] == expected(some_order(small), 0, 32)


def some_order(index):
    return stream_of(index, unit=4)


def test_mixture_draws_by_weight_and_in_each_source_order(tmp_path):
    parts = [
        build_index(numbered_shards(tmp_path / name, counts))
        for name, counts in (("a", [200]), ("b", [60, 60]))
    ]
    orders = [Order(p.counts, **(SMALL | {"seed": i})) for i, p in enumerate(parts)]
    mixed = Stream(parts, orders, Mixture([3.0, 1.0], seed=2))

    def decode(members, key):
        return len(members["jpg"]), int(members["jpg"])

    def collate(items):
        return {"numbers": [n for _, n in items]}

    def run(start, count):
        data = shard_stream(mixed, batch=10, decode=decode, collate=collate, start=start)
        return [n for b in islice(data, count) for n in b["numbers"]]

    source, _ = mixed.mixture.split(np.arange(1000))
    assert np.bincount(source).tolist() == [750, 250]
    got = np.array(run(0, 100))
    for one in range(2):
        alone = Stream([parts[one]], [orders[one]], Mixture([1.0], seed=0))
        assert got[source == one].tolist() == expected(alone, 0, int((source == one).sum()))
    assert got[500:].tolist() == run(500, 50)


def test_what_is_held_in_memory_is_bounded(stream):
    layout = Layout(12, rank=1, world=2)
    held = []
    with Reader(stream, layout, worker=1, workers=2) as reader:
        positions = layout.positions(1, 2)
        for start in islice(positions, 60):
            reader.take(start + np.arange(12))
            samples = sum(len(f.result()) for f in reader.loading.values())
            held.append((len(reader.loading), samples))
    most_blocks, most_samples = np.array(held).max(axis=0)
    assert most_blocks <= 4  # streams
    assert most_samples <= 4 * 24 / 4 + 24  # its share of streams * block, and a block at an edge


def test_a_worker_reads_only_its_own_samples_of_a_block(stream, monkeypatch):
    read = []
    original = blocks.fetch

    def counted(wanted):
        read.extend(wanted)
        return original(wanted)

    monkeypatch.setattr(blocks, "fetch", counted)
    as_worker(monkeypatch, 0, 2)
    list(islice(shard_stream(stream, world=2), 33))  # its part of an epoch
    assert 1584 / 4 <= len(read) <= 1584 / 4 + 24
