import math
import os
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from contramask import distributed
from contramask.data.index import build_index
from contramask.data.module import Images, ImageShards
from contramask.data.streaming import Streaming
from contramask.data.views import Crops
from contramask.errors import UserError
from tests.data.tars import numbered, photo, photo_shards, write_tar

VIEWS = {"one": Crops(number=2, size=12), "two": Crops(number=1, size=8)}


def module(train, **kwargs) -> ImageShards:
    shared = {"views": VIEWS, "batch_size": 6, "workers": 0, "images": Images(size=10, resize=10)}
    return ImageShards(train, **(shared | kwargs))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos")
    build_index(photo_shards(path, [40, 33]))
    build_index([str(write_tar(path / "val-000000.tar", _labelled(100, 17)))])
    return path


def _labelled(first, count):
    return [
        pair
        for n in range(first, first + count)
        for pair in ((f"v{n}.png", photo(n)), (f"v{n}.cls", f"{n % 3}".encode()))
    ]


@pytest.fixture
def data(folder):
    return module(f"{folder}/train-*.tar", val=f"{folder}/val-*.tar")


# ---- what there is --------------------------------------------------------------------------


def test_sizes_and_classes(data):
    assert (data.num_train, data.num_val, data.num_classes) == (73, 17, 3)
    assert data.epoch_of(0) == 0
    assert math.isclose(data.epoch_of(146), 2)


def test_classes_of_the_file_beside(tmp_path):
    build_index(photo_shards(tmp_path, [5]))
    (tmp_path / "classes.json").write_text('["a", "b", "c", "d"]')
    assert module(str(tmp_path)).num_classes == 4
    assert module(str(tmp_path), images=Images(classes=7)).num_classes == 7


def test_setup_says_what_is_wrong_before_training(tmp_path, folder):
    with pytest.raises(UserError, match=r"data.train: no shards match"):
        module(str(tmp_path / "*.tar")).setup()
    with pytest.raises(UserError, match=r"data.val: no shards match"):
        module(f"{folder}/train-*.tar", val=str(tmp_path / "*.tar")).setup()
    with pytest.raises(UserError, match=r"unit is 4, which does not divide the batch of 6"):
        module(f"{folder}/train-*.tar", streaming=Streaming(unit=4))
    urls = photo_shards(tmp_path, [9])
    build_index(urls)
    os.truncate(urls[0], 2048)
    with pytest.raises(UserError, match=r"train-000000.tar has 2048 bytes, its index says"):
        module(str(tmp_path)).setup()


def test_views_are_needed_to_train(folder):
    data = module(f"{folder}/train-*.tar", views=None)
    with pytest.raises(UserError, match=r"data.views names no views"):
        next(iter(data.train_dataloader()))


# ---- batches --------------------------------------------------------------------------------


def test_a_training_batch(data):
    raw = next(iter(data.train_dataloader()))
    assert {k: (v.dtype, tuple(v.shape)) for k, v in raw["views"].items()} == {
        "one": (torch.uint8, (2, 6, 3, 12, 12)),
        "two": (torch.uint8, (1, 6, 3, 8, 8)),
    }
    batch = data.to_device(raw, "cpu")
    assert set(batch) == {"views", "label", "position", "keys"}
    assert batch["views"]["one"].dtype == torch.float32
    assert abs(float(batch["views"]["one"].mean())) < 0.5
    assert batch["label"].tolist() == [int(k[1:]) % 3 for k in batch["keys"]]
    assert batch["position"] == 0


def test_training_is_a_function_of_the_seed_and_the_place(folder):
    def first(**kwargs):
        batches = islice(module(f"{folder}/train-*.tar", **kwargs).train_dataloader(), 3)
        return torch.cat([b["views"]["one"].flatten() for b in batches])

    assert torch.equal(first(), first(workers=1))
    assert not torch.equal(first(), first(seed=1))


def test_the_clean_view_is_the_central_square(data):
    batches = [data.to_device(b, "cpu") for b in data.val_dataloader()]
    assert [tuple(b["views"]["clean"].shape[:2]) for b in batches] == [(1, 6), (1, 6), (1, 5)]
    assert [k for b in batches for k in b["keys"]] == [f"v{n}" for n in range(100, 117)]
    assert [b["position"] for b in batches] == [0, 6, 12]
    assert torch.cat([b["label"] for b in batches]).tolist() == [n % 3 for n in range(100, 117)]


def test_ranks_share_the_clean_images(data, monkeypatch):
    keys = []
    monkeypatch.setattr(distributed, "world", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        keys += [k for b in data.clean_dataloader("train") for k in b["keys"]]
    assert sorted(keys) == [f"p{n:04d}" for n in range(73)]
    limited = [k for b in data.clean_dataloader("train", limit=20) for k in b["keys"]]
    assert len(limited) < 20  # rank 2's part
    monkeypatch.undo()
    assert len([k for b in data.clean_dataloader("train", 20) for k in b["keys"]]) == 20


def test_val_is_read_again_by_the_same_workers(data):
    data.workers = 1
    loader = data.val_dataloader()
    first = [b["keys"] for b in loader]
    workers = loader.kept._iterator._workers[0].pid
    assert [b["keys"] for b in loader] == first
    assert loader.kept._iterator._workers[0].pid == workers
    data.teardown()
    assert loader.kept is None


def test_no_validation_is_no_loader(folder):
    data = module(f"{folder}/train-*.tar")
    assert data.val_dataloader() == []
    assert data.num_val == 0
    with pytest.raises(UserError, match=r"data.val names no shards"):
        data.clean_dataloader("val")


# ---- bad samples ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "reason", "detail"),
    [
        ([("x.cls", b"1")], "missing key", "no image, only cls"),
        ([("x.png", photo(1))], "missing key", "no .cls"),
        ([("x.png", photo(1)), ("x.cls", b"3")], "label", r"3; labels are .* from 0 to 2"),
        ([("x.png", photo(1)), ("x.cls", b"-1")], "label", "-1"),
        ([("x.png", photo(1)), ("x.cls", b"cat")], "label", r"b'cat' is not a number"),
        ([("x.jpg", photo(1, (90, 70), "jpg")[:-900]), ("x.cls", b"1")], "truncated", ""),
        ([("x.png", b"text"), ("x.cls", b"1")], "not an image", ""),
        ([("x.png", photo(1, (1, 1))), ("x.cls", b"1")], "too small", "1 x 1"),
        ([("x.png", photo(1, (40, 3))), ("x.cls", b"1")], "too small", "40 x 3"),
    ],
)
@pytest.mark.parametrize("indexed", [True, False])
def test_bad_samples_are_named_and_counted(tmp_path, members, reason, detail, indexed):
    path = write_tar(tmp_path / "train-000000.tar", [*_labelled(0, 5), *members])
    (tmp_path / "classes.json").write_text('["a", "b", "c"]')
    if indexed:
        build_index(str(path))
    images = Images(size=10, resize=10, min_side=4)
    lenient = module(str(path), images=images, streaming=Streaming(max_bad=0.9))
    batches = list(islice(lenient.train_dataloader(), 3))
    assert all(len(b["label"]) == 6 for b in batches)
    assert set(lenient.faults) == {reason}
    strict = module(str(path), images=images, streaming=Streaming(max_bad=0.0))
    with pytest.raises(UserError, match=rf"1 {reason}\).*last: x of .*0.tar: {reason}.*{detail}"):
        list(islice(strict.train_dataloader(), 3))


def test_unlabelled_shards_have_label_minus_one(tmp_path):
    write_tar(tmp_path / "train-0.tar", [(f"x{n}.png", photo(n)) for n in range(9)])
    build_index(str(tmp_path))
    data = module(str(tmp_path))
    assert data.num_classes == 0
    assert next(iter(data.train_dataloader()))["label"].tolist() == [-1] * 6


def test_without_an_index_it_still_streams(tmp_path, caplog):
    urls = photo_shards(tmp_path, [10, 9])
    data = module(urls, val=urls)
    data.setup()
    assert data.num_train is None
    assert data.epoch_of(7) is None
    assert "has no index" in caplog.text
    assert [b["position"] for b in islice(data.train_dataloader(), 3)] == [0, 6, 12]
    assert sum(len(b["keys"]) for b in data.val_dataloader()) == 19


def test_weights_need_an_index(tmp_path):
    a, b = (photo_shards(tmp_path / name, [12])[0] for name in "ab")
    build_index(a)
    with pytest.raises(UserError, match=r"mixes sources, and .*b/train-000000.tar has no index"):
        module({a: 1.0, b: 1.0}).setup()
    build_index(b)
    data = module({a: 2.0, b: 1.0}, streaming=Streaming(index=None))
    assert data.num_train == 24
    next(iter(data.train_dataloader()))


def test_real_photographs_from_an_index_elsewhere(shared_data, tmp_path):
    folder, out = shared_data("cifar10"), str(tmp_path / "cifar10.json")
    build_index(f"{folder}/val-*.tar", out=out)
    data = module(f"{folder}/val-*.tar", streaming=Streaming(index=out), batch_size=32)
    assert (data.num_train, data.num_classes) == (3_000, 10)
    batch = next(iter(data.train_dataloader()))
    assert set(batch["label"].tolist()) <= set(range(10))
    assert len(set(batch["label"].tolist())) > 4


def test_position_counts_all_ranks_and_micro_batches(data, monkeypatch):
    assert data.position == 0
    monkeypatch.setattr(distributed, "world", lambda: 5)
    data.trainer = SimpleNamespace(global_step=7, accumulate_grad_batches=3)
    assert data.position == 7 * 3 * 5 * 6


def test_numbered_members_are_not_images(tmp_path):
    build_index(str(write_tar(tmp_path / "train-0.tar", numbered(0, 40))))
    with pytest.raises(UserError, match=r"samples in a row are bad|not an image"):
        next(iter(module(str(tmp_path), streaming=Streaming(grace=3)).train_dataloader()))
