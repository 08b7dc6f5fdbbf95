"""Images with masks: tiles, labels of patches, subsets, and what is wrong with single samples."""

import io
import struct
import tarfile
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from contramask.data.dense import Dense, DenseExamples, read_mask
from contramask.data.dense_shards import DenseShards
from contramask.data.examples import Examples, Images
from contramask.data.faults import BadSample
from contramask.data.index import build_index
from contramask.data.order import Layout
from contramask.data.streaming import Streaming
from contramask.types import UserError
from tests.data.tars import cut, write_tar

VOID, CLASSES = 9, 4
COLOURS = np.array([[230, 20, 20], [20, 230, 20], [20, 20, 230], [230, 230, 20]], np.uint8)
DENSE = Dense(classes=CLASSES, ignore=VOID, net=8, patch=4)


def encoded(pixels: np.ndarray) -> bytes:
    return saved(Image.fromarray(pixels))


def saved(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def scene(n: int, size: tuple[int, int] = (17, 26)) -> tuple[np.ndarray, np.ndarray]:
    """A picture in which colour is class, with a row of void; all scenes differ."""
    rng = np.random.default_rng(n)
    coarse = rng.integers(0, CLASSES, (-(-size[0] // 4), -(-size[1] // 4)), dtype=np.uint8)
    mask = coarse.repeat(4, 0).repeat(4, 1)[: size[0], : size[1]].copy()
    picture = COLOURS[mask]
    mask[0] = VOID
    return picture, mask


def members(n: int, *, size: tuple[int, int] = (17, 26), **changes: bytes) -> dict[str, bytes]:
    picture, mask = scene(n, size)
    found = {"png": encoded(picture), "seg.png": encoded(mask)}
    return found | {name.replace("_", "."): data for name, data in changes.items()}


def shard(path, numbers, *, size: tuple[int, int] = (17, 26), **changes: bytes):
    """A shard of scenes, the first of them changed."""
    first = next(iter(numbers), None)
    parts = [
        (f"s{n:03d}.{suffix}", data)
        for n in numbers
        for suffix, data in members(n, size=size, **(changes if n == first else {})).items()
    ]
    return write_tar(path, parts)


@pytest.fixture
def patterns(tmp_path) -> dict[str, str]:
    """11 images of train in two shards and 5 of val in one."""
    shard(tmp_path / "train-000000.tar", range(7))
    shard(tmp_path / "train-000001.tar", range(7, 11))
    shard(tmp_path / "val-000000.tar", range(20, 25))
    return {"train": str(tmp_path / "train-*.tar"), "val": str(tmp_path / "val-*.tar")}


def data_of(patterns, *, dense: Dense = DENSE, **changes) -> DenseShards:
    places = {k: changes.pop(k) for k in ("train_images", "patches_per_image") if k in changes}
    data = DenseShards(**patterns | {"workers": 0, "batch_size": 3} | changes)
    data.dense, data.images = dense, Images(size=8)
    for name, value in places.items():
        setattr(data, name, value)
    return data


def decoded(sample: dict[str, bytes], dense: Dense = DENSE, key: int = 0, **options):
    return DenseExamples(dense, reads=Examples(), **options).decode(sample, key)


def test_an_image_becomes_tiles_and_labelled_patches():
    picture, mask = scene(1)
    found = decoded(members(1), fill=(1, 2, 3), pictures=True)
    padded = np.full((24, 32, 3), (1, 2, 3), np.uint8)
    padded[:17, :26] = picture
    assert found.tiles.shape == (12, 3, 8, 8)
    for i in range(3):
        for j in range(4):
            expected = padded[8 * i : 8 * i + 8, 8 * j : 8 * j + 8].transpose(2, 0, 1)
            assert np.array_equal(found.tiles[4 * i + j].numpy(), expected)
    labels = found.labels.view(3, 4, 2, 2).permute(0, 2, 1, 3).reshape(6, 8).numpy()
    assert np.array_equal(labels[:4, :6], mask[2::4, 2::4][:4, :6])  # row 0 is void, row 2 not
    assert (labels[4:] == -1).all()  # rows from 18 on are beyond the edge
    assert (labels[:, 7] == -1).all()
    assert np.array_equal(found.mask.numpy(), np.where(mask == VOID, -1, mask.astype(int)))
    assert np.array_equal(found.picture.numpy(), picture)


@pytest.mark.parametrize(("size", "seen"), [(0.5, (8, 13)), ((32, 24), (32, 24))])
def test_images_are_resized_before_they_are_cut(size, seen):
    dense = Dense(CLASSES, ignore=VOID, net=8, patch=2, tile=4, size=size)
    found = decoded(members(2), dense)
    assert dense.resized(17, 26) == seen
    assert len(found.tiles) == -(-seen[0] // 4) * -(-seen[1] // 4)
    mask = torch.from_numpy(scene(2)[1]).float()[None, None]
    small = F.interpolate(mask, size=seen, mode="nearest-exact")[0, 0].long()
    small = torch.where(small == VOID, -1, small)
    assert torch.equal(found.labels.long(), dense.tiling.labels(small, classes=CLASSES))
    assert found.mask.shape == (17, 26)  # scored as it is


def test_patches_by_majority():
    mask = np.zeros((8, 8), np.uint8)
    mask[:4, :4] = [[2, 2, 2, 2], [2, 2, 2, 2], [2, 1, 1, 2], [2, 1, 1, 2]]
    sample = {"png": encoded(COLOURS[mask]), "seg.png": encoded(mask)}
    assert decoded(sample).labels[0, 0] == 1
    rule = Dense(CLASSES, ignore=VOID, net=8, patch=4, label="majority")
    assert decoded(sample, rule).labels[0, 0] == 2


def test_a_mask_is_read_as_numbers_whatever_its_palette():
    _, mask = scene(3)
    palette = Image.fromarray(mask)
    palette.putpalette([255 - v for v in range(256) for _ in range(3)])
    assert palette.mode == "P"
    assert np.array_equal(read_mask(saved(palette), size=mask.shape), mask)
    assert np.array_equal(read_mask(encoded(mask), size=mask.shape), mask)


def test_masks_without_numbers_of_classes_are_refused():
    picture, mask = scene(4)
    for data, kind in (
        (encoded(picture), "8 bits, RGB"),
        (encoded(np.dstack([picture, mask])), "8 bits, RGB with alpha"),
        (encoded(mask > 1), "1 bits, grey"),
        (encoded(mask.astype(np.uint16)), "16 bits, grey"),
    ):
        with pytest.raises(UserError, match=f"a PNG of {kind}; .*convert the masks"):
            decoded(members(4, seg_png=data))
    with pytest.raises(UserError, match="the label 9; labels are 0 to 3, and 255"):
        decoded(members(4), Dense(CLASSES, net=8, patch=4))


def test_faults_of_one_sample_are_told_by_their_reason():
    whole = members(5)["seg.png"]
    small = encoded(np.zeros((4, 5), np.uint8))
    for data, reason in (
        (small, r"mask size \(4 x 5 pixels, its image 17 x 26\)"),
        (b"GIF89a", r"mask \(not a PNG\)"),
        (whole[: len(whole) // 2], r"mask \(.*"),
    ):
        with pytest.raises(BadSample, match=reason):
            decoded(members(5, seg_png=data))
    with pytest.raises(BadSample, match=r"no \.seg\.png"):
        decoded({"png": members(5)["png"]})


def header(height: int, width: int) -> bytes:
    """A PNG of 70 bytes that says it is of that size."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(b"\0\0")), (b"IEND", b"")]
    whole = [(kind + data, len(data)) for kind, data in chunks]
    parts = [struct.pack(">I", n) + d + struct.pack(">I", zlib.crc32(d)) for d, n in whole]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("side", [9_000, 12_000, 50_000])
def test_a_mask_that_says_it_is_huge_is_one_bad_sample(side: int, monkeypatch):
    """Pillow says nothing of 81 million pixels, warns of 144 and refuses 2500."""
    monkeypatch.setattr(np, "array", lambda *_: pytest.fail("its pixels are decoded"))
    with pytest.raises(BadSample, match="mask size") as error:
        read_mask(header(side, side), size=(17, 26))
    assert error.value.reason == "mask size"
    monkeypatch.undo()
    with pytest.raises(BadSample, match="mask size"):
        decoded(members(5, seg_png=header(side, side)))


def test_labels_of_a_sample_of_patches_are_drawn_by_the_key():
    full = decoded(members(6)).labels
    some = [decoded(members(6), key=key, patches=7).labels for key in (1, 1, 2)]
    assert [(x >= 0).sum() for x in some] == [7, 7, 7]
    assert torch.equal(some[0], some[1])
    assert not torch.equal(some[0], some[2])
    assert all(torch.equal(x[x >= 0], full[x >= 0]) for x in some)
    assert torch.equal(decoded(members(6), patches=500).labels, full)


def seen(data: DenseShards, split: str, monkeypatch, ranks: int = 1) -> list[list[str]]:
    """Names of images that each rank gets."""
    parts = []
    for rank in range(ranks):
        monkeypatch.setattr(DenseShards, "_layout", lambda self, r=rank: Layout(3, r, ranks))
        parts.append([key for batch in data.dense_dataloader(split) for key in batch["keys"]])
    return parts


@pytest.mark.parametrize("indexed", [False, True])
def test_subsets_are_seeded_nested_and_the_same_for_all_ranks(patterns, indexed, monkeypatch):
    if indexed:
        build_index(patterns["train"])
    subsets = {}
    for count in (4, 9, None):
        one, two = (
            seen(data_of(patterns, train_images=count), "train", monkeypatch, ranks)
            for ranks in (1, 2)
        )
        subsets[count] = one[0]
        assert sorted(two[0] + two[1]) == one[0]
        assert len(one[0]) == (count or 11)
    assert set(subsets[4]) < set(subsets[9]) < set(subsets[None])
    other = seen(data_of(patterns, train_images=4, seed=1), "train", monkeypatch)
    assert other[0] != subsets[4]
    assert seen(data_of(patterns), "val", monkeypatch) == [[f"s{n:03d}" for n in range(20, 25)]]


def test_batches_reach_the_device_normalised(patterns):
    data = data_of(patterns, patches_per_image=5)
    data.pictures = True
    train, val = data.val_dataloader()
    batch = next(iter(train))
    finished = data.finish(batch)
    assert batch["counts"] == [12, 12, 12]
    assert batch["pictures"] == []
    assert (batch["labels"] >= 0).view(3, -1).sum(1).tolist() == [5, 5, 5]
    mean, std = (torch.tensor(x)[:, None, None] for x in (data.images.mean, data.images.std))
    expected = (batch["tiles"] / 255 - mean) / std
    torch.testing.assert_close(finished["tiles"], expected)
    assert finished["tiles"][3, :, :, 4:].abs().max() < 0.01  # behind the edge: the mean colour
    batch = next(iter(val))
    assert [p.shape for p in batch["pictures"]] == [(17, 26, 3)] * 3


def test_a_mask_of_another_size_is_skipped_and_counted(tmp_path, patterns, caplog):
    small = encoded(np.zeros((4, 5), np.uint8))
    shard(tmp_path / "train-000000.tar", range(7), seg_png=small)
    loader = data_of(patterns).dense_dataloader("train")
    assert [key for batch in loader for key in batch["keys"]] == [f"s{n:03d}" for n in range(1, 11)]
    assert loader.faults == Counter({"mask size": 1})
    assert "bad sample, mask size: s000" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mask_whose_labels_mean_nothing_is_named(tmp_path, patterns, workers):
    """Of a label out of range and of colours, in the process itself and in a worker."""
    picture, mask = scene(7)
    mask[3, 4] = CLASSES
    colours = encoded(picture)
    for data, told in ((encoded(mask), "a mask has the label 4"), (colours, "8 bits, RGB")):
        path = shard(tmp_path / "train-000001.tar", range(7, 11), seg_png=data)
        loader = data_of(patterns, workers=workers).dense_dataloader("train")
        with pytest.raises(UserError, match=f"^s007 of {path}: segmentation: .*{told}") as error:
            list(loader)
        assert "\n" not in str(error.value)


def test_when_most_samples_are_bad_reading_stops(tmp_path, patterns):
    small = encoded(np.zeros((4, 5), np.uint8))
    for n in range(3):
        shard(tmp_path / f"bad-{n}.tar", [n], seg_png=small)
    data = data_of(patterns | {"val": str(tmp_path / "bad-*.tar")})
    with pytest.raises(UserError, match=r"2 of 2 samples are bad \(2 mask size"):
        list(data.dense_dataloader("val"))


def test_mistakes_are_told_before_the_first_batch(tmp_path, patterns):
    write_tar(tmp_path / "empty-0.tar", [])
    write_tar(tmp_path / "bare-0.tar", [("a.png", members(0)["png"])])
    torn = shard(tmp_path / "torn-0.tar", range(3))
    cut(torn, 3000)
    (tmp_path / "nothing-0.tar").touch()
    for name, told in (
        ("empty", "data.val: .*empty-0.tar holds no sample"),
        ("bare", "data.val: no sample has a mask, only png"),
        ("torn", "data.val: .*torn-0.tar: cut short"),
        ("nothing", "data.val: .*nothing-0.tar: empty at byte 0"),
    ):
        with pytest.raises(UserError, match=told):
            data_of(patterns | {"val": str(tmp_path / f"{name}-*.tar")}).setup()
    with pytest.raises(UserError, match=r"data\.val names no shards"):
        data_of(patterns | {"val": None}).setup()
    with pytest.raises(UserError, match=r"train_images is 12; .*has 11 images; set --train_images"):
        data_of(patterns, train_images=12).setup()


def test_an_empty_shard_among_others_is_told(tmp_path, patterns, caplog):
    write_tar(tmp_path / "val-000001.tar", [])
    data = data_of(patterns)
    data.setup()
    assert data.wanted("val") == 5
    assert "1 shard(s) hold no sample, first" in caplog.text


def test_a_pipe_is_refused(patterns):
    data = data_of(patterns | {"val": "pipe:true"}, streaming=Streaming(allow_pipe=True))
    with pytest.raises(UserError, match=r"data\.val: pipe:true gives its bytes once"):
        data.setup()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"classes": 1}, "classes is 1; masks of 8 bits tell 2 to 256 apart"),
        ({"net": 10}, "tiles of 10 pixels, which are no whole number of patches of 4"),
        ({"tile": 1}, "tile is 1 pixels and has 2 patches a side"),
        ({"size": 0.0}, "size is 0.0; allowed are"),
        ({"size": -1.0}, "size is -1.0; allowed are"),
        ({"size": 512.0}, "size is 512.0; allowed are"),
    ],
)
def test_settings_that_are_not_allowed(changes, told):
    with pytest.raises(UserError, match=told):
        Dense(**{"classes": CLASSES, "net": 8, "patch": 4} | changes)


def test_camvid(shared_data):
    """Real masks: their labels and how many pixels of each, read again by Pillow alone."""
    folder = shared_data("camvid")
    pattern = {"train": f"{folder}/train-*.tar", "val": f"{folder}/val-*.tar"}
    data = data_of(pattern, dense=Dense(11, ignore=11, net=32, patch=8, tile=120))
    assert (data.wanted("train"), data.wanted("val")) == (123, 34)
    batch = next(iter(data.dense_dataloader("val")))
    assert batch["counts"] == [12, 12, 12]
    assert batch["tiles"].shape == (36, 3, 32, 32)
    with tarfile.open(folder / "val-000000.tar") as tar:
        for key, mask in zip(batch["keys"], batch["masks"], strict=True):
            file = tar.extractfile(f"{key}.seg.png")
            assert file is not None
            expected = np.asarray(Image.open(io.BytesIO(file.read()))).astype(int)
            assert np.array_equal(mask.numpy(), np.where(expected == 11, -1, expected))
    # A patch sees 30 pixels a side; its middle is where 15 lie on either side.
    tile = batch["masks"][0][120:240, 240:360]
    assert torch.equal(batch["labels"][1 * 4 + 2].view(4, 4), tile[15::30, 15::30].long())
