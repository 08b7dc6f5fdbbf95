import logging
import os
from itertools import islice

import pytest

from contramask.data import sequential
from contramask.data.faults import BadSample
from contramask.data.loader import Loader
from contramask.data.order import Layout
from contramask.data.sequential import SequentialStream, SequentialSweep
from contramask.data.streaming import Streaming
from contramask.errors import UserError
from tests.data.tars import number, numbered_shards, numbers

COUNTS = [30, 50, 20, 41, 33, 26, 60, 40]  # 300 samples


@pytest.fixture(scope="module")
def urls(tmp_path_factory):
    return numbered_shards(tmp_path_factory.mktemp("shards"), COUNTS)


def stream(urls, *, decode=number, batch=8, block=32, max_bad=0.01, **layout) -> SequentialStream:
    return SequentialStream(
        urls,
        layout=Layout(batch, **layout),
        decode=decode,
        collate=numbers,
        seed=4,
        streaming=Streaming(block=block, max_bad=max_bad),
    )


def taken(urls, monkeypatch, count, *, world=1, workers=1, **kwargs) -> list[dict]:
    found = []
    for rank in range(world):
        for worker in range(workers):
            monkeypatch.setattr(sequential, "place_of_worker", lambda w=worker: (w, workers))
            found += islice(stream(urls, rank=rank, world=world, **kwargs), count)
    return sorted(found, key=lambda b: b["position"])


def test_an_epoch_is_every_sample_in_an_order_of_its_own(urls):
    seen = [n for b in islice(stream(urls, batch=10), 60) for n in b["numbers"]]
    # Blocks of 32 cross the end of the epoch, so it is exact to a block.
    assert set(range(300)) <= set(seen[:320])
    assert seen[:300] != seen[300:600]
    assert seen[:300] != sorted(seen[:300])
    again = [n for b in islice(stream(urls, batch=10), 30) for n in b["numbers"]]
    assert again == seen[:300]


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (1, 3), (2, 2), (4, 2)])
def test_resume_is_exact_with_the_same_layout(urls, monkeypatch, world, workers):
    straight = taken(urls, monkeypatch, 30, world=world, workers=workers)
    assert [b["position"] for b in straight] == [8 * i for i in range(len(straight))]
    per_step = 8 * world
    for step in (1, 2, 11):
        resumed = taken(urls, monkeypatch, 6, world=world, workers=workers, start=step * per_step)
        first = step * world
        assert resumed == straight[first : first + len(resumed)]


@pytest.mark.parametrize("workers", [0, 2])
def test_through_a_real_loader(urls, workers):
    loader = Loader(lambda: stream(urls, start=40), workers=workers, streaming=Streaming())
    batches = iter(loader)
    positions = [b["position"] for b in islice(batches, 5)]
    batches.close()
    assert positions == [40, 48, 56, 64, 72]


def test_a_resume_with_another_layout_is_refused(urls):
    with pytest.raises(UserError, match="cannot go on at image 8 with 2 ranks of 8"):
        stream(urls, world=2, start=8)


def test_fewer_shards_than_readers(urls, monkeypatch):
    with pytest.raises(
        UserError,
        match=r"8 shards without an index cannot feed 9 readers \(3 ranks of 3 workers\)"
        r".*contramask pack index",
    ):
        taken(urls, monkeypatch, 1, world=3, workers=3)


def test_bad_samples_are_replaced_alike_after_a_resume(urls):
    def decode(members, key):
        value, key = number(members, key)
        if value % 5 == 0:
            raise BadSample("corrupt")
        return value, key

    def run(start):
        data = stream(urls, decode=decode, max_bad=0.5, start=start)
        return [b["numbers"] for b in islice(data, 20)]

    straight = run(0)
    assert all(n % 5 for some in straight for n in some)
    assert run(15 * 8)[:5] == straight[15:]


def test_a_mistake_names_the_sample_that_showed_it(urls):
    def decode(members, key):
        if number(members, key)[0] == 31:  # the second of the second shard
            raise UserError("the label is 12")
        return number(members, key)

    data = SequentialSweep(urls, layout=Layout(7), decode=decode, collate=numbers)
    with pytest.raises(UserError, match=f"^s00031 of {urls[1]}: the label is 12$"):
        list(data)


def test_damaged_shards_count_and_are_left(urls, tmp_path, caplog):
    some = numbered_shards(tmp_path, [20, 20])
    os.truncate(some[0], 9_000)
    loader = Loader(lambda: stream(some, max_bad=0.9), workers=0, streaming=Streaming())
    with caplog.at_level(logging.WARNING):
        list(islice(loader, 10))
    assert loader.faults["unreadable"] > 0
    assert f"bad sample, unreadable: {some[0]}" in caplog.text


def test_nothing_but_damage_ends(tmp_path):
    (url,) = numbered_shards(tmp_path, [3])
    os.truncate(url, 700)
    with pytest.raises(UserError, match=r"samples in|are bad"):
        list(islice(stream([url], max_bad=0.9), 5))


def test_a_missing_shard_is_named(urls):
    with pytest.raises(UserError, match=r"gone.tar is missing"):
        next(iter(stream(["gone.tar"])))


def test_a_pipe_is_read(urls):
    piped = [f"pipe:cat {url}" for url in urls[:2]]
    seen = {n for b in islice(stream(piped), 20) for n in b["numbers"]}
    assert seen == set(range(80))


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (2, 3), (4, 4)])
@pytest.mark.parametrize("limit", [None, 50])
def test_a_sweep_sees_each_sample_once(urls, monkeypatch, world, workers, limit):
    seen = []
    for rank in range(world):
        for worker in range(workers):
            monkeypatch.setattr(sequential, "place_of_worker", lambda w=worker: (w, workers))
            layout = Layout(7, rank, world)
            data = SequentialSweep(urls, layout=layout, decode=number, collate=numbers, limit=limit)
            seen += [n for b in data for n in b["numbers"]]
    assert len(seen) == len(set(seen))
    if limit is None:
        assert sorted(seen) == list(range(300))
    else:
        assert len(seen) == (50 if world * workers <= 8 else 8 * 3 + 2)


def test_places_of_a_sweep_do_not_depend_on_its_readers(urls, monkeypatch):
    """Sorted by place, samples come as the shards list them."""
    for world, workers in ((1, 1), (2, 1), (1, 3), (3, 2)):
        places = {}
        for rank in range(world):
            for worker in range(workers):
                here = (worker, workers)
                monkeypatch.setattr(sequential, "place_of_worker", lambda here=here: here)
                layout = Layout(7, rank, world)
                for b in SequentialSweep(urls, layout=layout, decode=number, collate=numbers):
                    places |= {b["position"] + i: n for i, n in enumerate(b["numbers"])}
        assert [places[p] for p in sorted(places)] == list(range(300))
