import errno
import hashlib
import io
import json
import logging
import os
import pickle
import resource
import zipfile
from pathlib import Path

import pytest
import torch

from contramask.checkpoints import files, sidecar
from contramask.checkpoints.files import AtomicCheckpointIO, CheckpointError, CorruptCheckpoint
from contramask.checkpoints.sink import Sink


def state(step: int, size: int = 5) -> dict:
    return {"global_step": step, "state_dict": {"w": torch.arange(size) * (step + 1.0)}}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def damage(path: Path, *, at: float = 0.5) -> None:
    """Flip one bit of the file's bytes, in place."""
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1
    path.write_bytes(data)


class Died(BaseException):
    """Stands for kill -9: no handler of an `Exception` sees it, no clean-up is to be trusted."""


def test_what_is_written_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "made" / "step-00000007.ckpt"
    record = files.write(state(7), path)
    assert torch.equal(files.load(path)["state_dict"]["w"], torch.arange(5) * 8.0)
    assert files.verify(path) == record
    assert record == sidecar.Record(7, path.stat().st_size, record.sha256)
    assert names(path.parent) == ["step-00000007.ckpt", "step-00000007.ckpt.json"]


def test_the_checksum_is_that_of_the_file(tmp_path: Path) -> None:
    record = files.write(state(3, size=100_003), tmp_path / "a.ckpt")
    assert record.sha256 == hashlib.sha256((tmp_path / "a.ckpt").read_bytes()).hexdigest()


def test_through_lightnings_door(tmp_path: Path) -> None:
    door = AtomicCheckpointIO()
    door.save_checkpoint(state(2), str(tmp_path / "a.ckpt"))
    assert door.load_checkpoint(str(tmp_path / "a.ckpt"))["global_step"] == 2
    door.remove_checkpoint(str(tmp_path / "a.ckpt"))
    assert names(tmp_path) == []


@pytest.mark.parametrize("at", [0.0, 0.1, 0.5, 0.99, 1.0])
def test_one_flipped_bit_is_seen(tmp_path: Path, at: float) -> None:
    path = tmp_path / "a.ckpt"
    files.write(state(7, size=1000), path)
    damage(path, at=at)
    with pytest.raises(CorruptCheckpoint, match=r"a\.ckpt is damaged: \d+ bytes"):
        files.load(path)


def test_without_a_sidecar_the_zip_members_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "copied.ckpt"
    files.write(state(7, size=1000), path)
    sidecar.sidecar(path).unlink()
    assert files.verify(path).step == 7
    damage(path)
    with pytest.raises(CorruptCheckpoint, match="is damaged: the checksum of its member"):
        files.load(path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(CorruptCheckpoint, match="is not a checkpoint"):
        files.load(path)


def test_a_damaged_sidecar_is_not_believed(tmp_path: Path, caplog) -> None:
    path = tmp_path / "a.ckpt"
    files.write(state(7), path)
    sidecar.sidecar(path).write_text("[{", "utf-8")
    assert files.verify(path).step == 7
    assert "a.ckpt.json is damaged" in caplog.text


@pytest.mark.parametrize("url", ["http://x.org/a.ckpt", "https://x.org/a.ckpt", "s3://b/a.ckpt"])
def test_urls_are_refused(url: str) -> None:
    with pytest.raises(CheckpointError, match="only local files are loaded"):
        AtomicCheckpointIO().load_checkpoint(url)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.ckpt: there is no such file"):
        files.load(tmp_path / "nowhere.ckpt")


class Malice:
    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


@pytest.mark.parametrize("described", [True, False])
def test_code_is_refused_and_not_run(tmp_path: Path, described: bool, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, sentinel = tmp_path / "a.ckpt", tmp_path / "sentinel"
    files.write({**state(7), "extra": Malice(sentinel)}, path)
    if not described:
        sidecar.sidecar(path).unlink()
    with pytest.raises(CheckpointError, match="more than tensors and plain values"):
        files.load(path)
    with pytest.raises(CheckpointError, match="weights_only=False would run code"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not sentinel.exists()
    torch.load(path, weights_only=False)  # the same file does run code elsewhere
    assert sentinel.exists()


def test_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(pickle.dumps(Malice(tmp_path / "sentinel")))
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        files.load(tmp_path / "a.ckpt")
    assert not (tmp_path / "sentinel").exists()


@pytest.mark.parametrize("call", range(1, 14))
def test_death_at_any_moment_leaves_a_good_file(tmp_path: Path, call: int, monkeypatch) -> None:
    """Die at the n-th change of the file system while `last.ckpt` is replaced."""
    path = tmp_path / "last.ckpt"
    files.write(state(4), path)
    count = 0

    def dying(real):
        def act(*args, **kwargs):
            nonlocal count
            count += 1
            if count >= call:  # dead from here on: the clean-up does not happen either
                raise Died
            return real(*args, **kwargs)

        return act

    with monkeypatch.context() as patch:
        for owner, name in ((os, "replace"), (os, "fsync"), (os, "link"), (Path, "unlink")):
            patch.setattr(owner, name, dying(getattr(owner, name)))
        try:
            files.write(state(9), path)
        except Died:
            died = True
        else:
            died = False
    assert died == (call <= 12), f"{count} changes"
    assert files.load(path)["global_step"] in ((4, 9) if died else (9,))
    assert files.newest(tmp_path) == path
    # The next start cleans up, and the next save is like any other.
    files.sweep(tmp_path)
    files.write(state(11), path)
    assert files.load(path)["global_step"] == 11
    assert names(tmp_path) == ["last.ckpt", "last.ckpt.json"]
    assert len(json.loads((tmp_path / "last.ckpt.json").read_text())) == 1


def test_a_full_disk_keeps_what_is_there(tmp_path: Path) -> None:
    old, new = tmp_path / "step-00000004.ckpt", tmp_path / "step-00000008.ckpt"
    files.write(state(4), old)
    before = names(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"File too large \(\d+ MiB free there\)") as info:
            files.write(state(8, size=1_000_000), new)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "step-00000004.ckpt is good and untouched" in str(info.value)
    assert "\n" not in str(info.value)
    assert names(tmp_path) == before
    assert files.load(old)["global_step"] == 4


class FullDisk(io.BytesIO):
    def write(self, data) -> int:
        if self.tell() + len(data) > 10_000:  # full in the middle of a file
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.parametrize("which", ["write", "fsync"])
def test_no_space_left(tmp_path: Path, which: str, monkeypatch) -> None:
    path = tmp_path / "last.ckpt"
    files.write(state(4), path)

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if which == "fsync":
        monkeypatch.setattr(os, "fsync", refuse)
    else:
        real = Sink.__init__
        monkeypatch.setattr(Sink, "__init__", lambda self, file: real(self, FullDisk()))
    with pytest.raises(CheckpointError, match=r"No space left on device.*last\.ckpt is good"):
        files.write(state(8, size=1_000_000), path)
    assert names(tmp_path) == ["last.ckpt", "last.ckpt.json"]
    monkeypatch.undo()
    assert files.load(path)["global_step"] == 4


def test_a_second_name_is_a_link(tmp_path: Path) -> None:
    first, last = tmp_path / "step-00000004.ckpt", tmp_path / "last.ckpt"
    files.write(state(4), first)
    files.place(first, last)
    files.place(first, last)  # rename(2) of two names of one file does nothing
    assert last.samefile(first)
    files.write(state(8), last)  # a new file under the name; the old one is not written into
    assert files.load(first)["global_step"] == 4
    assert files.load(last)["global_step"] == 8
    assert len(names(tmp_path)) == 4


def test_a_second_name_is_a_copy_where_links_fail(tmp_path: Path, monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    first, best = tmp_path / "step-00000004.ckpt", tmp_path / "best.ckpt"
    files.write(state(4), first)
    files.place(first, best)
    assert not best.samefile(first)
    files.remove(first)
    assert files.load(best)["global_step"] == 4
    assert names(tmp_path) == ["best.ckpt", "best.ckpt.json"]


def test_the_newest_is_the_one_of_most_updates(tmp_path: Path) -> None:
    assert files.newest(tmp_path) is None
    for step in (200, 1000, 900):  # not in the order of names or times
        files.write(state(step), tmp_path / f"step-{step}.ckpt")
    assert files.newest(tmp_path) == tmp_path / "step-1000.ckpt"
    files.write(state(1003), tmp_path / "last.ckpt")
    os.utime(tmp_path / "last.ckpt", (0, 0))
    assert files.newest(tmp_path) == tmp_path / "last.ckpt"


def test_damaged_ones_are_passed_over_and_named(tmp_path: Path, caplog) -> None:
    for step in (4, 8, 12):
        files.write(state(step), tmp_path / f"step-{step:08d}.ckpt")
    files.place(tmp_path / "step-00000012.ckpt", tmp_path / "last.ckpt")
    damage(tmp_path / "step-00000012.ckpt")  # and with it last.ckpt, which is the same file
    (tmp_path / "step-00000008.ckpt").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert files.newest(tmp_path) == tmp_path / "step-00000004.ckpt"
    for name in ("step-00000012.ckpt", "last.ckpt", "step-00000008.ckpt"):
        assert name in caplog.text


def test_a_name_that_is_older_than_its_sidecar_says(tmp_path: Path) -> None:
    """Killed between the sidecar and the rename: last.ckpt is still the file of step 4."""
    files.write(state(4), tmp_path / "last.ckpt")
    files.write(state(6), tmp_path / "best.ckpt")
    known = sidecar.records(tmp_path / "last.ckpt")
    coming = {"step": 8, "bytes": 1, "sha256": "00"}
    text = json.dumps([coming, *(vars(record) for record in known)])
    sidecar.sidecar(tmp_path / "last.ckpt").write_text(text)
    assert files.verify(tmp_path / "last.ckpt").step == 4
    assert files.newest(tmp_path) == tmp_path / "best.ckpt"


def test_a_foreign_file_is_no_checkpoint(tmp_path: Path, caplog) -> None:
    torch.save({"weights": torch.zeros(3)}, tmp_path / "a.ckpt")
    with zipfile.ZipFile(tmp_path / "b.ckpt", "w") as archive:
        archive.writestr("x", "y")
    assert files.newest(tmp_path) is None
    assert "no global_step" in caplog.text
    assert "b.ckpt cannot be opened as a checkpoint" in caplog.text


def test_sweep_takes_only_what_saves_left(tmp_path: Path) -> None:
    files.write(state(4), tmp_path / "last.ckpt")
    (tmp_path / "last.ckpt.tmp.12345").write_bytes(b"torn")
    (tmp_path / "last.ckpt.json.tmp.12345").write_bytes(b"torn")
    files.sweep(tmp_path)
    assert names(tmp_path) == ["last.ckpt", "last.ckpt.json"]
