import errno
import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from contramask.cli.pack import main
from contramask.data import pack as packing_module
from contramask.data.index import load_index, verify
from contramask.data.layouts import image_folder
from contramask.data.originals import Encoding, Original, kind, read
from contramask.data.pack import Packing, ShardWriter, pack
from contramask.data.tarball import scan
from contramask.data.tarwriter import TarWriter
from contramask.errors import UserError
from tests.data.tars import photo, samples_of


def test_an_image_folder(images, tmp_path):
    listing = image_folder(images)
    assert listing.classes == ["cat", "dog"]
    assert listing.aside == "1 .txt"
    packed = pack(listing.originals, tmp_path / "s" / "train", classes=listing.classes)
    assert packed.bad == []
    found = samples_of(tmp_path / "s", "train")
    assert len(found) == 39
    for name, members in found.items():
        assert members["cls"] == (b"0" if name.startswith("cat") else b"1")
        original = (images / name).read_bytes()
        (suffix,) = set(members) - {"cls", "json"}
        if name.endswith(("bmp", "gif")):
            assert suffix == "png"
        else:
            assert members[suffix] == original  # byte for byte
            assert suffix == ("png" if "odd" in name else name.rsplit(".")[-1])
    assert json.loads((tmp_path / "s" / "classes.json").read_text()) == ["cat", "dog"]
    assert verify(str(tmp_path / "s")) == []
    index = load_index([str(tmp_path / "s" / "train-000000.tar")])
    assert index is not None
    assert (index.samples, index.labels) == (39, 2)


def test_lossless_formats_keep_their_pixels(images):
    members = read(Original(str(images / "dog" / "x.bmp")), Encoding())
    assert isinstance(members, dict)
    pixels = np.asarray(Image.open(io.BytesIO(members["png"])))
    assert (pixels == np.asarray(Image.open(images / "dog" / "x.bmp").convert("RGB"))).all()


def test_the_same_bytes_twice_and_with_any_number_of_processes(images, tmp_path):
    originals = image_folder(images).originals
    hashes = []
    for name, processes in (("a", 1), ("b", 1), ("c", 3)):
        pack(originals, tmp_path / name / "x", packing=Packing(max_count=11, processes=processes))
        files = sorted((tmp_path / name).iterdir())
        assert [f.name for f in files] == [f"x-00000{i}.tar" for i in range(4)] + ["x.index.json"]
        hashes.append([hashlib.sha256(f.read_bytes()).hexdigest() for f in files])
    assert hashes[0] == hashes[1] == hashes[2]


def test_tars_are_plain_posix_without_times_and_owners(images, tmp_path):
    pack(image_folder(images).originals, tmp_path / "x")
    data = (tmp_path / "x-000000.tar").read_bytes()
    assert data[257:265] == b"ustar\x0000"
    assert len(data) % 10240 == 0
    with tarfile.open(tmp_path / "x-000000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            assert (member.uname, member.gname) == ("", "")


def test_the_writers_entry_is_what_a_scan_finds(images, tmp_path):
    packed = pack(image_folder(images).originals, tmp_path / "x", packing=Packing(max_mb=0.03))
    assert len(packed.shards) > 2
    for entry in packed.shards:
        found, flaws = scan(entry.url)
        assert flaws == []
        assert (found.bytes, found.sha256, found.suffixes) == (
            entry.bytes, entry.sha256, entry.suffixes,
        )  # fmt: skip
        assert found.starts.tolist() == entry.starts.tolist()
        assert found.lengths.tolist() == entry.lengths.tolist()
        assert found.labels == entry.labels
        assert entry.starts[-1] + entry.lengths[-1] <= 30_000


def test_the_order_is_shuffled_by_a_seed(images, tmp_path):
    originals = image_folder(images).originals

    def order(name, **kwargs):
        pack(originals, tmp_path / name / "x", packing=Packing(**kwargs))
        return list(samples_of(tmp_path / name, "x"))

    listed_order = order("a", seed=None)
    assert listed_order == [o.notes["file"] for o in originals]
    assert order("b", seed=0) != listed_order
    assert order("c", seed=1) != order("d", seed=2)


def test_validation_takes_the_classes_of_training(images, tmp_path):
    val = tmp_path / "val"
    (val / "dog").mkdir(parents=True)
    (val / "dog" / "1.png").write_bytes(photo(1))
    main(["imagefolder", str(images), str(tmp_path / "s" / "train")])
    main(["imagefolder", str(val), str(tmp_path / "s" / "val")])
    assert samples_of(tmp_path / "s", "val")["dog/1.png"]["cls"] == b"1"
    (val / "emu").mkdir()
    (val / "emu" / "1.png").write_bytes(photo(2))
    with pytest.raises(UserError, match="has the class 'emu', which is none of the 2"):
        main(["imagefolder", str(val), str(tmp_path / "s" / "other")])


def test_other_classes_beside_are_not_overwritten(tmp_path):
    original = [Original(__file__)]
    (tmp_path / "classes.json").write_text('["a", "b"]')
    with pytest.raises(UserError, match=r"names other classes \(a, b ...\) than these"):
        pack(original, tmp_path / "x", classes=["c"])


def test_masks_become_members(images, tmp_path):
    masks = tmp_path / "masks"
    for name in [o.notes["file"] for o in image_folder(images).originals]:
        path = masks / (name.rsplit(".", 1)[0] + ".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(hash(name) % 99, (5, 4)))
    main(["imagefolder", str(images), str(tmp_path / "s" / "train"), "--masks", str(masks)])
    found = samples_of(tmp_path / "s", "train")
    assert found["cat/odd.JPEG"]["seg.png"] == (masks / "cat" / "odd.png").read_bytes()
    assert len(found) == 39


def test_masks_are_resized_with_their_images(tmp_path):
    labels = np.zeros((40, 60), np.uint8)
    labels[:, 30:] = 7
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "masks" / "a").mkdir(parents=True)
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path / "in" / "a" / "x.png")
    mask = Image.fromarray(labels, "P")
    mask.putpalette([c for k in range(256) for c in (k, 255 - k, 9)])
    mask.save(tmp_path / "masks" / "a" / "x.png")
    out = str(tmp_path / "s" / "train")
    options = ["--masks", str(tmp_path / "masks"), "--resize", "20"]
    main(["imagefolder", str(tmp_path / "in"), out, *options])
    (sample,) = samples_of(tmp_path / "s", "train").values()
    with Image.open(io.BytesIO(sample["png"])) as image:
        assert image.size == (30, 20)
    with Image.open(io.BytesIO(sample["seg.png"])) as small:
        assert (small.mode, small.size) == ("P", (30, 20))
        assert np.array_equal(np.unique(np.asarray(small)), [0, 7])


def test_unlabelled_images(tmp_path):
    (tmp_path / "images").mkdir()
    for n in range(3):
        (tmp_path / "images" / f"{n}.png").write_bytes(photo(n))
    listing = image_folder(tmp_path / "images")
    assert listing.classes is None
    packed = pack(listing.originals, tmp_path / "x")
    assert packed.shards[0].suffixes == {"png": 3, "json": 3}
    assert not (tmp_path / "classes.json").exists()


def test_resize_and_quality(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(photo(1, (90, 60), "jpg"))
    small = read(Original(str(path)), Encoding(resize=30))
    assert isinstance(small, dict)
    assert Image.open(io.BytesIO(small["jpg"])).size == (45, 30)
    assert read(Original(str(path)), Encoding(resize=60)) == {"jpg": path.read_bytes()}
    (tmp_path / "a.png").write_bytes(photo(1, (90, 60)))
    png = read(Original(str(tmp_path / "a.png")), Encoding(resize=30))
    assert set(png) == {"png"}
    sizes = [
        len(read(Original(str(tmp_path / "a.png")), Encoding(quality=q))["jpg"]) for q in (20, 90)
    ]
    assert sizes[0] < sizes[1]


def test_kinds_by_their_first_bytes():
    assert [kind(photo(1, suffix=s)) for s in ("jpg", "png", "webp", "bmp")] == [
        "jpg", "png", "webp", None,
    ]  # fmt: skip


@pytest.fixture
def spoilt(images):
    (images / "cat" / "bad-1.jpg").write_bytes(photo(1, (80, 60), "jpg")[:-700])
    (images / "cat" / "bad-2.png").write_bytes(b"no image")
    (images / "dog" / "bad-3.png").symlink_to("nowhere.png")
    return images


def test_bad_images_are_left_out_by_name(spoilt, tmp_path, capsys):
    main(["imagefolder", str(spoilt), str(tmp_path / "s" / "train"), "--max-bad", "0.1",
          "--processes", "1"])  # fmt: skip
    told = capsys.readouterr().out
    for name, reason in (
        ("bad-1.jpg", "truncated"), ("bad-2.png", "not an image"), ("bad-3.png", "unreadable"),
    ):  # fmt: skip
        assert any(name in line and reason in line for line in told.splitlines()), told
    assert "39 samples" in told
    assert "3 bad images left out" in told
    assert len(samples_of(tmp_path / "s", "train")) == 39


def test_too_many_bad_images_leave_nothing_behind(spoilt, tmp_path):
    originals = image_folder(spoilt).originals
    with pytest.raises(UserError, match=r"1 of 42 images are bad.*--max-bad; nothing was written"):
        pack(originals, tmp_path / "s" / "x", packing=Packing(max_mb=0.01))
    assert list((tmp_path / "s").iterdir()) == []


def test_without_verification_bytes_are_only_copied(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(photo(1, (80, 60), "jpg")[:-700])
    assert isinstance(read(Original(str(path)), Encoding()), str)
    assert read(Original(str(path)), Encoding(verify=False)) == {"jpg": path.read_bytes()}


def test_nothing_is_overwritten_unasked(images, tmp_path):
    originals = image_folder(images).originals
    pack(originals, tmp_path / "x", packing=Packing(max_count=5))
    before = (tmp_path / "x-000000.tar").read_bytes()
    with pytest.raises(UserError, match=r"x-000000.tar is already there.*--overwrite"):
        pack(originals, tmp_path / "x")
    assert (tmp_path / "x-000000.tar").read_bytes() == before
    pack(originals, tmp_path / "x", packing=Packing(overwrite=True, max_count=30))
    assert sorted(p.name for p in tmp_path.glob("x*")) == [
        "x-000000.tar", "x-000001.tar", "x.index.json",
    ]  # fmt: skip
    assert verify(str(tmp_path / "x-*.tar")) == []


def test_an_interrupted_pack_leaves_the_old_shards(images, tmp_path, monkeypatch):
    originals = image_folder(images).originals
    pack(originals, tmp_path / "x")
    before = (tmp_path / "x-000000.tar").read_bytes()

    def interrupted(*_):
        yield {"png": b"1"}
        raise KeyboardInterrupt

    monkeypatch.setattr(packing_module, "_read_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(originals, tmp_path / "x", packing=Packing(overwrite=True))
    assert sorted(p.name for p in tmp_path.glob("x*")) == ["x-000000.tar", "x.index.json"]
    assert (tmp_path / "x-000000.tar").read_bytes() == before


def test_samples_of_ones_own(tmp_path):
    with ShardWriter(tmp_path / "mine", max_count=2) as writer:
        for n in range(5):
            writer.add(f"{n}", {"png": photo(n), "cls": b"1"})
        shards = writer.finish()
    assert [s.count for s in shards] == [2, 2, 1]
    with (
        pytest.raises(UserError, match="not one good sample"),
        ShardWriter(tmp_path / "empty") as writer,
    ):
        writer.finish()


def test_a_full_disk_leaves_nothing_behind(images, tmp_path, monkeypatch):
    def full(self, data):
        if self.bytes > 20_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    write = TarWriter._write
    monkeypatch.setattr(TarWriter, "_write", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        pack(image_folder(images).originals, tmp_path / "s" / "x", packing=Packing(max_mb=0.03))
    assert list((tmp_path / "s").iterdir()) == []
