import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from contramask.data.index import build_index, check_shards, classes_of, load_index, verify
from contramask.data.index_file import index_name, read_index
from contramask.types import UserError
from tests.data.server import serving
from tests.data.tars import cut, header_of, numbered_shards, photo, spoil, write_tar

# ---- the file -------------------------------------------------------------------------------


def test_index_is_written_read_and_true(tmp_path):
    urls = numbered_shards(tmp_path, [5, 0, 12])
    built = build_index(str(tmp_path))
    loaded = load_index(urls)
    assert loaded is not None
    assert [s.url for s in loaded.shards] == urls
    assert loaded.counts.tolist() == [5, 0, 12]
    assert (loaded.samples, loaded.labels) == (17, 10)
    for ours, theirs in zip(loaded.shards, built.shards, strict=True):
        assert ours.sha256 == theirs.sha256
        assert ours.sha256 == hashlib.sha256(Path(ours.url).read_bytes()).hexdigest()
        assert ours.starts.tolist() == theirs.starts.tolist()
        assert ours.lengths.tolist() == theirs.lengths.tolist()
    assert verify(str(tmp_path)) == []
    check_shards(loaded)
    content = json.loads((tmp_path / "part.index.json").read_text())
    assert content["shards"][2]["name"] == "part-000002.tar"


def test_processes_and_twice_give_the_same_file(tmp_path):
    numbered_shards(tmp_path, [3, 4, 5])
    told = []
    build_index(str(tmp_path))
    first = (tmp_path / "part.index.json").read_bytes()
    build_index(str(tmp_path), processes=2, progress=lambda done, of: told.append((done, of)))
    assert (tmp_path / "part.index.json").read_bytes() == first
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("a/train-000012.tar", "a/train.index.json"),
        ("s3://b/c/imagenet1k_val_03.tar", "s3://b/c/imagenet1k_val.index.json"),
        ("000001.tar", "index.json"),
        ("x/flowers.tar", "x/flowers.index.json"),
    ],
)
def test_where_an_index_lies(url, name):
    assert index_name(url) == name


def test_equal_names_in_two_folders_stay_apart(tmp_path):
    left, right = (numbered_shards(tmp_path / d, n) for d, n in (("a", [3]), ("b", [8])))
    build_index([*left, *right])
    index = load_index([*right, *left])
    assert index is not None
    assert index.counts.tolist() == [8, 3]
    out = str(tmp_path / "both.json")
    build_index([*left, *right], out=out)
    index = load_index([*right, *left], file=out)
    assert index is not None
    assert index.counts.tolist() == [8, 3]


def test_an_index_moves_with_its_folder_and_grows(tmp_path, monkeypatch):
    numbered_shards(tmp_path / "old", [3, 4])
    build_index(str(tmp_path / "old" / "part-000000.tar"))
    build_index(str(tmp_path / "old" / "part-000001.tar"))
    (tmp_path / "old").rename(tmp_path / "new")
    monkeypatch.chdir(tmp_path)
    index = load_index(["new/part-000000.tar", "new/part-000001.tar"])
    assert index is not None
    assert index.counts.tolist() == [3, 4]


def test_no_index_is_none_and_half_an_index_is_refused(tmp_path):
    urls = numbered_shards(tmp_path, [3, 4, 5])
    assert load_index(urls) is None
    build_index(urls[:2])
    with pytest.raises(UserError, match=r"1 of 3 shards are not in their index .*part-000002.tar"):
        load_index(urls)
    with pytest.raises(UserError, match=r"there is no index .*none.json"):
        load_index(urls, file=str(tmp_path / "none.json"))


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "contramask index", "version": 9}', "{}"])
def test_a_broken_index_is_refused(tmp_path, text):
    (url,) = numbered_shards(tmp_path, [3])
    (tmp_path / "part.index.json").write_text(text)
    with pytest.raises(UserError, match=r"part.index.json is not an index of version 1"):
        load_index([url])


def test_a_shard_of_another_size_or_none_is_refused_by_name(tmp_path):
    urls = numbered_shards(tmp_path, [3, 4, 5])
    build_index(urls)
    index = load_index(urls)
    assert index is not None
    os.truncate(urls[1], 5120)
    with pytest.raises(UserError, match=r"part-000001.tar has 5120 bytes, its index says \d+;"):
        check_shards(index)
    os.unlink(urls[0])
    with pytest.raises(UserError, match=r"part-000000.tar is missing \(and 1 more\)"):
        check_shards(index)


def test_a_shard_of_the_same_size_with_other_bytes_is_refused_by_name(tmp_path):
    first, second = numbered_shards(tmp_path, [4, 5])
    build_index([first, second])
    size = os.path.getsize(second)
    Path(second).write_bytes(np.random.default_rng(0).bytes(size))
    with pytest.raises(
        UserError, match=r"-000001.tar has no sample at byte \d+, as its index says"
    ):
        check_shards(load_index([first, second]))


def test_a_damaged_shard_is_not_indexed(tmp_path):
    (url,) = numbered_shards(tmp_path, [9])
    spoil(url, header_of(url, 8), bytes(512))
    with pytest.raises(UserError, match=r"part-000000.tar: zeroed header at byte"):
        build_index(url)


def test_an_index_that_cannot_be_written_says_where_else(tmp_path):
    numbered_shards(tmp_path, [3])
    (tmp_path / "part.index.json.part").mkdir()  # in the way; root may write to read-only folders
    with pytest.raises(UserError, match=r"part.index.json cannot be written .*--out FILE"):
        build_index(str(tmp_path))


def test_index_over_http(tmp_path):
    numbered_shards(tmp_path, [3, 4])
    build_index(str(tmp_path))
    with serving(tmp_path) as server:
        urls = [f"{server.url}/part-00000{i}.tar" for i in range(2)]
        index = load_index(urls)
        assert index is not None
        check_shards(index)
        assert [s.url for s in index.shards] == urls
        assert load_index([f"{server.url}/other-0.tar"]) is None
        tars = [(name, count) for name, _, count in server.sent if name != "part.index.json"]
        assert sorted(tars) == [("part-000000.tar", 512), ("part-000001.tar", 512)]
        out = str(tmp_path / "remote.json")
        build_index(urls, out=out)
        again = load_index(urls, file=out)
    assert again is not None
    assert again.shards[1].sha256 == index.shards[1].sha256


# ---- verify ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda u: spoil(u[1], header_of(u[1], 2) + 512, b"#"), [r"000001.tar: sha256 "]),
        (lambda u: spoil(u[1], header_of(u[1], 2), bytes(512)), [r"000001.tar: zeroed header"]),
        (lambda u: spoil(u[1], header_of(u[1], 2), b"#" * 512), [r"000001.tar: damaged header"]),
        (lambda u: cut(u[1], 3000), [r"000001.tar: cut short"]),
        (lambda u: cut(u[1], 0), [r"000001.tar: empty"]),
        (lambda u: os.unlink(u[1]), [r"000001.tar: in the index but missing"]),
        (lambda u: os.replace(u[0], u[1]), [r"000000.tar: in the index", r"000001.tar: bytes"]),
    ],
)
def test_verify_names_each_kind_of_damage(tmp_path, damage, expected):
    urls = numbered_shards(tmp_path, [13, 4, 5])
    build_index(urls)
    damage(urls)
    found = verify(str(tmp_path))
    for pattern in expected:
        assert any(pattern in line for line in found), found
    assert all("000002" not in line for line in found)


def test_verify_decodes_images_when_asked(tmp_path):
    members = [("a.jpg", photo(1, (90, 70), "jpg")[:-900]), ("b.png", photo(2)), ("c.png", b"no")]
    path = str(write_tar(tmp_path / "x-0.tar", members))
    build_index(path)
    assert verify(path) == []
    found = verify(path, decode=True)
    assert [line.split(" (")[0] for line in found] == [
        f"{path}: a: truncated", f"{path}: c: not an image",
    ]  # fmt: skip


def test_verify_of_shards_without_index(tmp_path):
    urls = numbered_shards(tmp_path, [3, 4])
    assert verify(urls) == [f"{tmp_path}/part.index.json: there is no such index"]
    build_index(urls[0])
    assert verify(urls) == [f"{urls[1]}: not in its index"]


def test_classes_beside_the_shards(tmp_path):
    urls = [*numbered_shards(tmp_path / "a", [2]), *numbered_shards(tmp_path / "b", [2])]
    assert classes_of(urls) is None
    (tmp_path / "a" / "classes.json").write_text('["cat", "dog"]')
    assert classes_of(urls) == ["cat", "dog"]
    (tmp_path / "b" / "classes.json").write_text('["dog", "cat"]')
    with pytest.raises(UserError, match="name different classes"):
        classes_of(urls)


def test_real_shards_are_indexed_out_of_their_folder(shared_data, tmp_path):
    folder, out = shared_data("cifar10"), str(tmp_path / "cifar10.json")
    build_index(f"{folder}/val-{{000000..000002}}.tar", out=out)
    index = load_index([f"{folder}/val-00000{i}.tar" for i in range(3)], file=out)
    assert index is not None
    assert index.samples == 3_000
    assert index.labels == 10
    entries = read_index(out)
    assert entries is not None
    assert np.concatenate([s.lengths for s in entries.values()]).min() >= 4 * 512
