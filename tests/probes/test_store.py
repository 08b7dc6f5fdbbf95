"""Stored features: whole after any stop, refused where they are damaged or another's."""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contramask.probes import store_buffer
from contramask.probes.features import Feature
from contramask.probes.store import Bank, StoredFeatures, StoredRows
from contramask.probes.store_buffer import Buffer
from contramask.probes.store_files import PartWriter, PassFolder, checksum
from contramask.probes.store_shelf import Shelf
from contramask.types import Batch, UserError

A, B = Feature(), Feature("block_07", "cls+mean", "none")
WIDTH = {A: 3, B: 5}
PLACES = 53
BAD = {7, *range(20, 27)}  # unreadable
UNLABELLED = {3, 40}


@pytest.fixture(scope="module", autouse=True)
def _unsynced():
    """No test of this file pulls the plug, and waiting for the disk takes a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


def batch_at(start: int, size: int) -> Batch | None:
    """The micro-batch at a place, as `ShardSweep` makes it; None where all its samples are bad."""
    good = [i for i in range(start, min(start + size, PLACES)) if i not in BAD]
    labels = torch.tensor([-1 if i in UNLABELLED else i % 4 for i in good], dtype=torch.long)
    if not good:
        return None
    return Batch(views={}, label=labels, position=start, keys=[f"k{i}" for i in good])


def values(feature: Feature, batch: Batch) -> torch.Tensor:
    """A feature that says whose it is."""
    numbers = torch.tensor([float(k[1:]) for k in batch["keys"]])
    return numbers[:, None] * 10 + torch.arange(WIDTH[feature])


def batches(start: int, size: int, rank: int, world: int, workers: int):
    """What the DataLoader of a rank gives out: its workers in turn, without those that ended."""
    lanes = []
    for worker in range(workers):
        places = range(start + (worker * world + rank) * size, PLACES, size * world * workers)
        lanes.append([b for p in places if (b := batch_at(p, size)) is not None])
    while any(lanes):
        for lane in lanes:
            if lane:
                yield lane.pop(0)


def extract(shelf: Shelf, wanted, *, world=1, workers=1, size=6, stop: int | None = None) -> int:
    """One generation of ranks; `stop`: each is killed after so many batches. Images it read."""
    folder = shelf.new_pass(wanted)
    _, start = folder.parts()
    generation, read = folder.generation, 0
    assert start is not None
    for rank in range(world):
        folder.path.mkdir(parents=True, exist_ok=True)
        writer = PartWriter(folder, generation=generation, rank=rank, world=world, start=start)
        buffer = Buffer(
            writer,
            wanted,
            stride=size * world,
            first=start + rank * size,
            lanes=workers,
        )
        for number, batch in enumerate(batches(start, size, rank, world, workers)):
            if number == stop:
                break
            buffer.add(batch, [values(f, batch) for f in wanted], batch["label"])
            read += len(batch["keys"])
        else:
            buffer.end()
    if stop is None:
        folder.finish()
    return read


def shelf_in(folder: Path, **changes) -> Shelf:
    return Shelf(folder, "train", {"backbone": "abc", "limit": None} | changes)


def check(bank: Bank) -> None:
    """Every labelled good image once, in order, with its own features."""
    places = [i for i in range(PLACES) if i not in BAD | UNLABELLED]
    assert bank.keys == [f"k{i}" for i in places]
    assert bank.y.tolist() == [i % 4 for i in places]
    for feature, x in bank.x.items():
        expected = torch.tensor(places)[:, None] * 10.0 + torch.arange(WIDTH[feature])
        assert torch.equal(x, expected)


@pytest.mark.parametrize(("world", "workers", "size"), [(1, 1, 6), (2, 1, 6), (3, 2, 7), (1, 3, 1)])
def test_rows_do_not_depend_on_ranks_workers_and_batches(tmp_path, world, workers, size):
    shelf = shelf_in(tmp_path)
    extract(shelf, [A, B], world=world, workers=workers, size=size)
    check(shelf.open([A, B]))


generations = st.tuples(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(0, 6), st.integers(1, 99)
)


@settings(max_examples=25)
@given(stops=st.lists(generations, max_size=4))
def test_whatever_stops_come_nothing_is_lost_or_twice(stops):
    """Other numbers of ranks, workers and images of a batch each time, parts of other sizes."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        shelf = shelf_in(Path(folder))
        for world, workers, size, stop, rows in stops:
            patch.setattr(store_buffer, "BYTES", rows)
            if shelf.new_pass([A, B]).parts()[1] is not None:
                extract(shelf, [A, B], world=world, workers=workers, size=size, stop=stop)
        if shelf.new_pass([A, B]).parts()[1] is None:  # all ranks ended before they were stopped
            shelf.new_pass([A, B]).finish()
        else:
            extract(shelf, [A, B])
        check(shelf.open([A, B]))


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    monkeypatch.setattr(store_buffer, "BYTES", 0)
    shelf = shelf_in(tmp_path)
    first = extract(shelf, [A], size=6, stop=5)
    assert extract(shelf, [A], size=6) == PLACES - len(BAD) - first
    check(shelf.open([A]))


def test_a_batch_that_a_slower_worker_still_holds_is_not_taken_for_done(tmp_path, monkeypatch):
    """Worker 0 has a batch of bad samples only, so its next one overtakes that of worker 1."""
    monkeypatch.setattr(store_buffer, "BYTES", 0)
    order = [b["position"] for b in batches(0, 1, 0, 1, 4)]
    assert order != sorted(order)
    for stop in (5, 17, 20, 23, 26):
        shelf = shelf_in(tmp_path / str(stop))
        extract(shelf, [A], workers=4, size=1, stop=stop)
        extract(shelf, [A], workers=4, size=1)
        check(shelf.open([A]))


def test_only_features_that_are_missing_are_extracted(tmp_path):
    shelf = shelf_in(tmp_path)
    extract(shelf, [A])
    assert shelf.missing([B, A, B]) == (B,)
    extract(shelf, [B])
    assert shelf.missing([A, B]) == ()
    check(shelf.open([B, A]))


def test_another_backbone_has_another_folder_and_a_moved_one_is_refused(tmp_path):
    mine, other = shelf_in(tmp_path), shelf_in(tmp_path, backbone="xyz")
    extract(other, [A])
    assert mine.missing([A]) == (A,)
    shutil.move(other.path, mine.path)
    with pytest.raises(UserError, match=r"manifest.json holds features of another backbone; they"):
        mine.missing([A])


def manifest_of(shelf: Shelf) -> Path:
    (path,) = shelf.path.glob("pass-*/manifest.json")
    return path


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-4]), r"has \d+ bytes, its manifest says \d+"),
        (lambda p: p.write_bytes(p.read_bytes()[:-4] + b"abcd"), "another checksum"),
        (lambda p: p.unlink(), "cannot be read"),
    ],
)
@pytest.mark.parametrize("last", ["last-cls-final", "rows", "keys"])
def test_a_damaged_file_is_named(tmp_path, damage, told, last):
    shelf = shelf_in(tmp_path)
    extract(shelf, [A])
    (path,) = shelf.path.glob(f"pass-*/*.{last}.npy")
    damage(path)
    with pytest.raises(UserError, match=rf"{last}\.npy .*{told}.*; remove"):
        shelf.open([A])


@pytest.mark.parametrize(
    "content", ["", "[]", '{"format": 99}', '{"format": 1, "content": {}, "parts": [{}]}']
)
def test_a_damaged_manifest_is_named(tmp_path, content):
    shelf = shelf_in(tmp_path)
    extract(shelf, [A])
    manifest_of(shelf).write_text(content)
    with pytest.raises(UserError, match="is no manifest of stored features"):
        shelf.missing([A])


def test_without_a_manifest_there_is_nothing(tmp_path):
    shelf = shelf_in(tmp_path)
    extract(shelf, [A], stop=3)
    assert shelf.missing([A]) == (A,)


def test_passes_of_other_images_are_refused(tmp_path):
    shelf = shelf_in(tmp_path)
    extract(shelf, [A])
    path = manifest_of(shelf)
    extract(shelf, [B])
    manifest = json.loads(path.read_text())
    manifest["parts"][0]["stop"] = 30
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="its passes hold different images; remove this folder"):
        shelf.open([A, B])


def test_ranks_that_write_elsewhere_are_told(tmp_path):
    folder = shelf_in(tmp_path).new_pass([A])
    folder.path.mkdir(parents=True)
    writer = PartWriter(folder, generation=0, rank=0, world=2, start=0)
    writer.end()
    with pytest.raises(UserError, match="--cache must be a folder that all ranks see"):
        folder.finish()


def test_one_process_at_a_time(tmp_path):
    folder = PassFolder(tmp_path, {}, [A])
    with folder.locked() as mine, folder.locked() as their, folder.locked(wanted=False) as reader:
        assert (mine, their, reader) == (True, False, True)
    with folder.locked() as again:
        assert again


def test_a_full_disk_is_told_and_leaves_nothing_half(tmp_path, monkeypatch):
    def full(*_, **__) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=r"rows\.npy cannot be written \(No space left"):
        extract(shelf_in(tmp_path), [A])
    assert not [p for p in tmp_path.rglob("*") if "npy" in p.name]


def test_names_need_no_ascii_and_no_labels_give_no_rows(tmp_path):
    shelf = shelf_in(tmp_path)
    folder = shelf.new_pass([A])
    folder.path.mkdir(parents=True)
    buffer = Buffer(
        PartWriter(folder, generation=0, rank=0, world=1, start=0),
        [A],
        stride=2,
        first=0,
        lanes=1,
    )
    labels = torch.tensor([4, -1])
    batch = Batch(views={}, label=labels, position=0, keys=["Straße/größer", "b"])
    buffer.add(batch, [torch.randn(2, 3)], labels)
    buffer.end()
    folder.finish()
    assert shelf.open([A]).keys == ["Straße/größer"]
    empty = Shelf(tmp_path, "val", {})
    folder = empty.new_pass([A])
    folder.path.mkdir(parents=True)
    PartWriter(folder, generation=0, rank=0, world=1, start=0).end()
    folder.finish()
    with pytest.raises(UserError, match="no image of val has a label"):
        empty.open([A]).check("val", 3)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 9))
def test_rows_by_number_are_those_of_the_joined_whole(sizes, seed):
    generator = np.random.default_rng(seed)
    arrays = [generator.standard_normal((n, 4)).astype(np.float32) for n in sizes]
    part = np.repeat(np.arange(len(sizes)), sizes)
    row = np.concatenate([np.arange(n) for n in sizes])
    order = generator.permutation(len(part))[: generator.integers(1, len(part) + 1)]
    whole = np.concatenate(arrays)[order]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.npy" for i in range(len(sizes))]
        for file, array in zip(files, arrays, strict=True):
            np.save(file, array)
        rows = StoredRows(files, part[order], row[order], 4)
        assert rows.shape == whole.shape
        asked = generator.integers(0, len(whole), 5)
        assert np.array_equal(rows[torch.from_numpy(asked)].numpy(), whole[asked])
        x = StoredFeatures({A: rows})
        assert np.array_equal(x[A].numpy(), whole)
        assert x[A] is x[A]


def test_one_part_is_mapped_not_read(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(6, 2)
    np.save(tmp_path / "a.npy", array)
    rows = StoredRows([tmp_path / "a.npy"], np.zeros(6, int), np.arange(6), 2)
    before = checksum(tmp_path / "a.npy")
    x = rows.join()
    assert rows._maps[0].flags.owndata is False
    x[0, 0] = 99  # a private copy of the page
    assert checksum(tmp_path / "a.npy") == before
