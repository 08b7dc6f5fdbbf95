import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contramask.cli.pack import main
from contramask.data.index import load_index
from contramask.data.layouts import image_folder, manifest, torchvision
from contramask.data.originals import Encoding, read
from contramask.errors import UserError
from tests.data.tars import listed, photo, samples_of


def test_manifests(images, tmp_path):
    rows = [
        ("path", "label", "mask", "place"),
        ("cat/odd.JPEG", "cat", "", "Höfn"),
        ("dog/x.bmp", "dog", "cat/odd.JPEG", "here"),
    ]
    table = images / "m.csv"
    table.write_text("\n".join(",".join(row) for row in rows), "utf-8")
    listing = manifest(table)
    assert listing.classes == ["cat", "dog"]
    assert [o.label for o in listing.originals] == [0, 1]
    assert listing.originals[0].notes == {"file": "cat/odd.JPEG", "place": "Höfn"}
    main(["manifest", str(table), str(tmp_path / "s" / "m")])
    found = samples_of(tmp_path / "s", "m")
    assert found["dog/x.bmp"]["seg.png"] == photo(90)
    assert json.loads(found["cat/odd.JPEG"]["json"])["place"] == "Höfn"

    lines = tmp_path / "m.jsonl"
    lines.write_text('{"path": "cat/odd.JPEG", "label": 7, "tags": [1]}\n\n')
    listing = manifest(lines, root=images)
    assert listing.classes is None
    assert listing.originals[0].label == 7
    assert listing.originals[0].notes["tags"] == [1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "file,label\na.png,1", "entry 1 has no path, only file, label"),
        ("m.csv", "path,label\na.png,1\nb.png,", "entry 2 has no label, others do"),
        ("m.csv", "path\n", "lists no images"),
        ("m.txt", "path\n", r"ends in .csv, .tsv or .jsonl"),
        ("m.jsonl", '{"path": "a"}\n{', "line 2 is not JSON"),
        ("m.jsonl", "[1]", "line 1 is not an object"),
        ("n.csv", None, "there is no manifest"),
    ],
)
def test_manifests_that_are_none(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        manifest(tmp_path / name)


def planes(n: int, side: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (3, side, side), dtype=np.uint8)


def cifar(root: Path, *, ten: bool) -> None:
    folder = root / ("cifar-10-batches-bin" if ten else "cifar-100-binary")
    folder.mkdir()
    names = "\n".join(f"class{i}" for i in range(10 if ten else 100))
    (folder / ("batches.meta.txt" if ten else "fine_label_names.txt")).write_text(names + "\n\n")
    files = [f"data_batch_{i}.bin" for i in range(1, 6)] if ten else ["train.bin"]
    for i, name in enumerate([*files, "test_batch.bin" if ten else "test.bin"]):
        head = (lambda n: bytes([n])) if ten else (lambda n: bytes([7, n]))
        records = [head(n) + planes(100 * i + n, 32).tobytes() for n in range(4)]
        (folder / name).write_bytes(b"".join(records))


@pytest.mark.parametrize("ten", [True, False])
def test_cifar(tmp_path, ten):
    cifar(tmp_path, ten=ten)
    name = "cifar10" if ten else "cifar100"
    main(["torchvision", str(tmp_path), str(tmp_path / "s"), "--name", name])
    index = load_index([str(tmp_path / "s" / f"{s}-000000.tar") for s in ("train", "val")])
    assert index is not None
    assert index.counts.tolist() == [20 if ten else 4, 4]
    members = listed(tmp_path / "s" / "train-000000.tar")
    for key in {name.split(".")[0] for name in members}:
        note = json.loads(members[f"{key}.json"])
        batch = int(note["file"][11]) - 1 if ten else 0
        expected = planes(100 * batch + note["record"], 32).transpose(1, 2, 0)
        pixels = np.asarray(Image.open(io.BytesIO(members[f"{key}.png"])))
        assert (pixels == expected).all()
        assert int(members[f"{key}.cls"]) == note["record"]
    classes = json.loads((tmp_path / "s" / "classes.json").read_text())
    assert classes[3] == "class3"
    assert len(classes) == (10 if ten else 100)


def test_stl10(tmp_path):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    (folder / "class_names.txt").write_text("airplane\nbird\ncar\n")
    images = [planes(n, 96) for n in range(3)]
    for stem in ("train", "test", "unlabeled"):
        # The file keeps columns: each plane transposed.
        (folder / f"{stem}_X.bin").write_bytes(
            b"".join(i.transpose(0, 2, 1).tobytes() for i in images)
        )
    (folder / "train_y.bin").write_bytes(bytes([1, 3, 2]))
    (folder / "test_y.bin").write_bytes(bytes([2, 2, 1]))
    splits = torchvision(tmp_path, "stl10")
    assert {k: [o.label for o in v.originals] for k, v in splits.items()} == {
        "train": [0, 2, 1], "val": [1, 1, 0], "unlabeled": [None] * 3,
    }  # fmt: skip
    members = read(splits["train"].originals[1], Encoding())
    assert isinstance(members, dict)
    pixels = np.asarray(Image.open(io.BytesIO(members["png"])))
    assert (pixels == images[1].transpose(1, 2, 0)).all()


def test_imagenette(tmp_path):
    for split in ("train", "val"):
        for wnid in ("n01440764", "n02102040")[: 2 if split == "train" else 1]:
            folder = tmp_path / "imagenette2-160" / split / wnid
            folder.mkdir(parents=True)
            (folder / "1.JPEG").write_bytes(photo(1, suffix="jpg"))
    splits = torchvision(tmp_path, "imagenette")
    assert splits["val"].classes == ["n01440764", "n02102040"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar10", r"cifar-10-binary.tar.gz from https://.*holds pickles, which contramask never"),
        ("cifar100", r"cifar-100-binary.tar.gz"),
        ("stl10", r"stl10_binary.tar.gz from"),
        ("imagenette", r"imagenette2.tgz from"),
    ],
)
def test_what_to_download(tmp_path, name, message):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(UserError, match=message):
        torchvision(tmp_path, name)


def test_a_binary_that_is_cut(tmp_path):
    cifar(tmp_path, ten=True)
    os.truncate(tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin", 5000)
    with pytest.raises(UserError, match=r"data_batch_2.bin is not whole: 1 images and 1927 bytes"):
        torchvision(tmp_path, "cifar10")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "is not a folder"),
        (lambda p: p.mkdir(), "holds no images; they end in .bmp"),
        (lambda p: [(p / "a").mkdir(parents=True), (p / "a" / "1.png").touch(),
                    (p / "2.png").touch()], r"images of none \(2.png"),
    ],
)  # fmt: skip
def test_folders_that_are_none(tmp_path, make, message):
    make(tmp_path / "images")
    with pytest.raises(UserError, match=message):
        image_folder(tmp_path / "images")
