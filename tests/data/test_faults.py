import os
import pickle
from itertools import islice

import pytest

from contramask.data.faults import BadSample
from contramask.data.index import build_index
from contramask.data.loader import Loader
from contramask.data.streaming import Streaming
from contramask.errors import UserError
from tests.data.streams import (
    CLS,
    JPG,
    as_worker,
    bad_of,
    expected,
    header,
    loaded,
    one_bad_shard,
    overwrite,
    shard_stream,
    stream_of,
)
from tests.data.tars import number, numbered, numbered_shards, write_tar


def an_epoch(index, **kwargs):
    data = shard_stream(stream_of(index, unit=2), batch=4, max_bad=0.9, **kwargs)
    return list(islice(data, 15))


@pytest.mark.parametrize(
    ("damage", "reason", "count"),
    [
        (lambda p: os.truncate(p, header(p, JPG) + 600), "truncated", 10),
        (lambda p: os.truncate(p, header(p, JPG) + 100), "truncated", 10),
        (lambda p: os.truncate(p, header(p, JPG)), "truncated", 10),
        (lambda p: os.truncate(p, 0), "truncated", 20),
        (lambda p: overwrite(p, header(p, JPG), b"#" * 512), "unreadable", 1),
        (lambda p: overwrite(p, header(p, JPG), bytes(512)), "unreadable", 1),
        (lambda p: overwrite(p, header(p, CLS), b"#" * 512), "missing key", 1),
        (lambda p: overwrite(p, header(p, CLS), bytes(512)), "missing key", 1),
    ],
)
def test_damage_costs_what_is_damaged_and_no_more(tmp_path, damage, reason, count):
    index = one_bad_shard(tmp_path, damage)
    batches = an_epoch(index)
    seen = [n for b in batches for n in b["numbers"]]
    assert len(seen) == 60  # full batches
    spoilt = set(range(30, 30 + count)) if count < 20 else set(range(20, 40))
    assert set(seen) == set(range(60)) - spoilt
    found = bad_of(batches)
    assert list(found) == [reason]
    assert len(found[reason]) == count
    assert all(name.endswith(f"of {index.shards[1].url}") for name in found[reason])


def test_duplicate_and_scattered_members(tmp_path):
    members = numbered(0, 30)
    members.insert(2, ("s00000.jpg", b"0"))  # twice
    label = members.pop(4)  # the label of sample 1 ...
    assert label[0] == "s00001.cls"
    members.append(label)  # ... at the end
    index = build_index(str(write_tar(tmp_path / "x-0.tar", members)))
    assert index.samples == 31
    data = shard_stream(stream_of(index, unit=1), batch=1, max_bad=0.9)
    found = bad_of(islice(data, 31))
    names = {reason: {n.split(" of ")[0] for n in some} for reason, some in found.items()}
    assert names == {"unreadable": {"sample 0"}, "missing key": {"s00001"}}


def spoilt_decode(members, key):
    value = int(members["jpg"])
    if value % 7 == 3:
        raise BadSample("corrupt", "test")
    return value, key


def test_substitutes_are_the_same_after_a_resume_and_in_any_layout(stream, monkeypatch):
    def run(start, **kwargs):
        data = shard_stream(stream, decode=spoilt_decode, max_bad=0.5, start=start, **kwargs)
        return islice(data, 10)

    straight = list(run(0))
    numbers = [n for b in straight for n in b["numbers"]]
    assert all(n % 7 != 3 for n in numbers)
    plain = expected(stream, 0, 120)
    assert all(a == b for a, b in zip(numbers, plain, strict=True) if b % 7 != 3)
    assert next(run(5 * 12))["numbers"] == straight[5]["numbers"]
    as_worker(monkeypatch, 1, 2)
    assert next(run(0, rank=1, world=2))["numbers"] == straight[3]["numbers"]


def test_too_many_bad_samples_stop_with_names(stream):
    data = shard_stream(stream, decode=spoilt_decode, max_bad=0.05, grace=10)
    with pytest.raises(
        UserError,
        match=r"11 of \d+ samples are bad \(11 corrupt\), more than the allowed fraction of 0.05; "
        r"last: s\d+ of .*tar: corrupt \(test\).*pack --check.*max_bad",
    ) as caught:
        list(islice(data, 50))
    assert "\n" not in str(caught.value)


def test_strict_reading_stops_at_the_first(stream):
    data = shard_stream(stream, decode=spoilt_decode, max_bad=0.0)
    with pytest.raises(UserError, match="1 of "):
        list(islice(data, 50))


def test_nothing_good_at_all_ends(stream):
    def never(members, key):
        raise BadSample("corrupt")

    with pytest.raises(UserError, match="100 samples in a row are bad"):
        next(iter(shard_stream(stream, decode=never, max_bad=0.99, grace=1000)))


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_workers_keep_one_line(stream, workers):
    data = shard_stream(stream, decode=spoilt_decode, max_bad=0.0)
    with pytest.raises(UserError, match=r"^1 of \d+ samples are bad") as caught:
        loaded(data, workers, 50)
    assert "\n" not in str(caught.value)


def test_a_shard_that_vanishes_is_named(tmp_path):
    index = build_index(numbered_shards(tmp_path, [20, 20]))
    os.unlink(index.shards[1].url)
    with pytest.raises(UserError, match=r"part-000001.tar could be read when training started"):
        an_epoch(index)


def test_bad_samples_are_logged_by_name_and_counted(stream, caplog):
    data = shard_stream(stream, decode=spoilt_decode, max_bad=0.5)
    loader = Loader(lambda: data, workers=0, streaming=Streaming())
    with caplog.at_level("WARNING"):
        list(islice(loader, 20))
    assert loader.faults["corrupt"] > 25
    assert caplog.text.count("bad sample, corrupt: s0") == 20
    assert caplog.text.count("are counted only") == 1


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("suffix", ["pyd", "pkl", "pickle", "pth", "pkl.gz", "PYD", "ten", "exe"])
def test_hostile_members_are_neither_run_nor_given(tmp_path, suffix):
    mark = tmp_path / "ran"
    evil = pickle.dumps(Trap(str(mark)))
    members = [("../x.jpg", b"7"), ("../x.cls", b"1")]
    for name, data in numbered(0, 8):
        members += [(name, data), (f"{name[:6]}.{suffix}", evil)]
    index = build_index(str(write_tar(tmp_path / "x-0.tar", members)))
    given = []

    def decode(members, key):
        given.append(set(members))
        return number(members, key)

    data = shard_stream(stream_of(index, unit=1), batch=9, decode=decode)
    (batch,) = islice(data, 1)
    assert sorted(batch["numbers"]) == [0, 1, 2, 3, 4, 5, 6, 7, 7]
    assert all(some == {"jpg", "cls"} for some in given)
    assert not mark.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x-0.tar", "x.index.json"]


def test_webdataset_is_told_to_refuse_pickles():
    from webdataset.autodecode import unpickle_loads

    with pytest.raises(ValueError, match="security"):
        unpickle_loads(pickle.dumps(1))
