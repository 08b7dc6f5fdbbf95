import pytest

from contramask.data.order import Layout
from contramask.data.shards import ShardSweep
from contramask.data.streaming import Streaming
from tests.data.streams import (
    JPG,
    as_worker,
    bad_of,
    header,
    one_bad_shard,
    overwrite,
)
from tests.data.tars import number, numbers


def swept(index, monkeypatch, *, world=1, workers=1, batch=12, **kwargs) -> list[list[dict]]:
    found = []
    for rank in range(world):
        for worker in range(workers):
            as_worker(monkeypatch, worker, workers)
            layout = Layout(batch, rank, world)
            data = ShardSweep(index, layout=layout, decode=number, collate=numbers, **kwargs)
            found.append(list(data))
    return found


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (1, 3), (2, 2), (3, 1), (16, 4), (7, 5)])
@pytest.mark.parametrize("limit", [None, 50, 9000])
def test_a_sweep_sees_each_sample_once(index, monkeypatch, world, workers, limit):
    parts = swept(index, monkeypatch, world=world, workers=workers, limit=limit)
    batches = sorted((b for part in parts for b in part), key=lambda b: b["position"])
    seen = [n for b in batches for n in b["numbers"]]
    assert len(seen) == len(set(seen)) == min(1600, limit or 1600)
    assert seen == sorted(seen)
    if limit is None:
        assert seen == list(range(1600))
    per_rank = [sum(len(b["numbers"]) for b in parts[r * workers + w])
                for r in range(world) for w in range(workers)]  # fmt: skip
    assert max(per_rank) - min(per_rank) <= 12


def test_subsets_are_nested_and_seeded(index, monkeypatch):
    def subset(limit, seed, **kwargs):
        parts = swept(index, monkeypatch, limit=limit, seed=seed, **kwargs)
        return {n for part in parts for b in part for n in b["numbers"]}

    assert subset(30, 1) < subset(60, 1)
    assert subset(30, 1) == subset(30, 1, world=3, batch=7)
    assert subset(30, 1) != subset(30, 2)


@pytest.mark.parametrize("limit", [None, 500])
def test_a_sweep_begins_where_it_is_told(index, limit):
    """With whatever ranks and batches: the places from there on, and no other."""
    whole = list(ShardSweep(index, layout=Layout(12), decode=number, collate=numbers, limit=limit))
    expected = [n for b in whole for n in b["numbers"]][120:]
    for world, batch in ((1, 12), (3, 7)):
        found = {}
        for rank in range(world):
            layout = Layout(batch, rank, world, start=120)
            for b in ShardSweep(index, layout=layout, decode=number, collate=numbers, limit=limit):
                found |= {b["position"] + i: n for i, n in enumerate(b["numbers"])}
        assert [found[place] for place in sorted(found)] == expected
        assert min(found) == 120


def test_a_sweep_leaves_out_the_bad(tmp_path, monkeypatch):
    index = one_bad_shard(tmp_path, lambda p: overwrite(p, header(p, JPG), bytes(512)))
    (batches,) = swept(index, monkeypatch, streaming=Streaming(max_bad=0.1))
    assert [n for b in batches for n in b["numbers"]] == [n for n in range(60) if n != 30]
    assert list(bad_of(batches)) == ["unreadable"]
