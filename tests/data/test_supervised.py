"""Labelled shards: augmentation by the place, targets, low-shot parts, what is refused."""

import io
import random
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup

from contramask.data.augmentation import Augment
from contramask.data.augmenting import BatchAugment, RandAugment, drawn, posterize
from contramask.data.examples import Images
from contramask.data.index import build_index
from contramask.data.photometric import Photometric
from contramask.data.subset import Subset
from contramask.data.supervised import LabelledShards
from contramask.errors import UserError
from contramask.types import fold
from tests.data.tars import photo, photo_shards, write_tar

PLAIN = Augment(randaugment=None, erasing=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0)
SIZE = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """73 training images and 17 for validation, of three classes."""
    path = tmp_path_factory.mktemp("photos")
    build_index(photo_shards(path, [40, 33]))
    build_index([str(write_tar(path / "val-000000.tar", labelled(100, 17)))])
    return path


def labelled(first, count, classes=3):
    return [
        pair
        for n in range(first, first + count)
        for pair in ((f"v{n}.png", photo(n)), (f"v{n}.cls", f"{n % classes}".encode()))
    ]


def shards(folder, **changes) -> LabelledShards:
    images = Images(size=SIZE, resize=SIZE, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    shared = {"val": f"{folder}/val-*.tar", "batch_size": 6, "workers": 0, "images": images}
    return LabelledShards(f"{folder}/train-*.tar", **shared | changes)


def batches(data, count, *, step=0):
    """The first batches from an update on."""
    data.trainer = SimpleNamespace(
        global_step=step,
        accumulate_grad_batches=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return [data.finish(batch) for batch in islice(data.train_dataloader(), count)]


# ---- the batch --------------------------------------------------------------------------------


def test_a_batch(folder):
    data = shards(folder)
    data.setup()
    batch = batches(data, 1)[0]
    assert batch["views"]["train"].shape == (1, 6, 3, SIZE, SIZE)
    assert batch["target"].shape == (6, 3)
    torch.testing.assert_close(batch["target"].sum(1), torch.ones(6))
    assert (data.num_classes, data.num_train, data.num_val) == (3, 73, 17)
    clean = data.to_device(next(iter(data.clean_dataloader("val"))), "cpu")
    assert set(clean) == {"views", "label", "position", "keys"}  # nothing is mixed


def test_targets_without_mixing(folder):
    batch = batches(shards(folder, augment=PLAIN), 1)[0]
    assert torch.equal(batch["target"], torch.eye(3)[batch["label"]])
    smooth = Augment(randaugment=None, mix=0.0, smoothing=0.3)
    batch = batches(shards(folder, augment=smooth), 1)[0]
    expected = 0.7 * torch.eye(3)[batch["label"]] + 0.1
    torch.testing.assert_close(batch["target"], expected)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_everything_is_a_function_of_the_position(folder, mode):
    """Also what the trainer's own generators are at the time, and how many workers there are."""
    augment = Augment(erasing=0.5, mode=mode)
    straight = batches(shards(folder, augment=augment), 5)
    random.seed(99)
    np.random.seed(98)  # noqa: NPY002
    torch.manual_seed(97)
    # Three updates are behind us, of 6 images each.
    later = batches(shards(folder, augment=augment), 2, step=3)
    for found, expected in zip(later, straight[3:], strict=True):
        assert found["position"] == expected["position"]
        assert found["keys"] == expected["keys"]
        assert torch.equal(found["views"]["train"], expected["views"]["train"])
        assert torch.equal(found["target"], expected["target"])
    other = batches(shards(folder, augment=augment, seed=1), 1)[0]
    assert other["keys"] != straight[0]["keys"]


def test_workers_draw_the_same(folder):
    straight = batches(shards(folder), 3)
    for found, expected in zip(batches(shards(folder, workers=2), 3), straight, strict=True):
        assert torch.equal(found["views"]["train"], expected["views"]["train"])


def test_global_generators_are_left_alone(folder):
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(3)
    states = np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    data = shards(folder, augment=Augment(erasing=1.0))
    data.regularise(torch.zeros(6, 3, SIZE, SIZE), torch.zeros(6).long(), 12)
    data.change(torch.zeros(3, SIZE, SIZE).byte(), 5)
    assert np.random.get_state()[1].tolist() == states[0]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[1])
    python = random.getstate()  # by itself: beartype draws from it when it checks what is returned
    with drawn(4, torch.device("cpu")):
        drew = random.random()
    assert random.getstate() == python
    assert drew == random.Random(4).random()


# ---- it is timm's -----------------------------------------------------------------------------


def test_randaugment_is_that_of_timm():
    """With the settings `timm.data.create_transform` gives it, after seeding by hand."""
    crop = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 20, 20), dtype=np.uint8))
    name, mean = "rand-m9-mstd0.5-inc1", (0.485, 0.456, 0.406)
    ours = RandAugment(name, size=20, mean=mean, interpolation="bicubic")
    settings = {"translate_const": 9, "img_mean": (124, 116, 104)}
    theirs = rand_augment_transform(name, settings | {"interpolation": Image.Resampling.BICUBIC})
    changed = 0
    for seed in range(12):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        expected = np.asarray(theirs(Image.fromarray(crop.permute(1, 2, 0).numpy())))
        found = ours(crop, seed)
        assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)
        changed += not torch.equal(found, crop)
    assert changed >= 6


def test_the_strongest_operations_are_no_error():
    """All fifteen, at the greatest magnitude: posterize keeps no bit then, and Pillow refuses 0."""
    crop = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 20, 20), dtype=np.uint8))
    for name in ("rand-m10-n15-p1-inc1", "rand-m0-n15-p1", "rand-m20-mmax20-n15-p1-inc1"):
        change = RandAugment(name, size=20, mean=(0.5, 0.5, 0.5), interpolation="bilinear")
        for seed in range(20):
            assert change(crop, seed).shape == (3, 20, 20)
    picture = Image.fromarray(crop.permute(1, 2, 0).numpy())
    for bits in range(1, 8):
        kept = np.asarray(posterize(picture, bits))
        assert np.array_equal(kept, np.asarray(picture) >> (8 - bits) << (8 - bits))
    assert posterize(picture, 8).tobytes() == picture.tobytes()
    assert not np.asarray(posterize(picture, 0)).any()


def test_mixing_is_that_of_timm():
    images, labels = torch.rand(6, 3, SIZE, SIZE), torch.arange(6) % 4
    ours = BatchAugment(Augment(erasing=0.0), 4, seed=3)
    theirs = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=4)
    kinds = set()
    for position in range(0, 60, 6):
        np.random.seed(fold(3, "mix", position) % 2**32)  # noqa: NPY002
        expected, target = theirs(images.clone(), labels)
        found, shares = ours(images.clone(), labels, position)
        assert torch.equal(found, expected)
        assert torch.equal(shares, target)
        same = (found == images).all(1).any()
        kinds.add("cutmix" if same else "mixup")
    assert kinds == {"cutmix", "mixup"}


def test_erasing_is_drawn_for_each_image_by_its_place():
    """Whatever batch it is in: two ranks erase what one process would."""
    augment = Augment(erasing=0.5, mix=0.0)
    ours, labels = BatchAugment(augment, 3, seed=0), torch.zeros(40).long()
    whole, _ = ours(torch.zeros(40, 3, SIZE, SIZE), labels, 100)
    half, _ = ours(torch.zeros(20, 3, SIZE, SIZE), labels[:20], 120)
    assert torch.equal(whole[20:], half)
    erased = (whole != 0).flatten(1).any(1)
    assert 10 <= erased.sum() <= 30
    noise = whole[erased][whole[erased] != 0]
    assert abs(noise.std() - 1) < 0.1
    share = (whole[erased] != 0).float().mean((1, 2, 3))
    assert share.min() >= 0.01
    assert share.max() <= 0.42  # a third, rounded to pixels
    assert len({tuple(x.flatten().tolist()) for x in whole[erased]}) == erased.sum()
    const = BatchAugment(Augment(erasing=1.0, erasing_mode="const", mix=0.0), 3, seed=0)
    images, _ = const(torch.ones(9, 3, SIZE, SIZE), labels[:9], 0)
    assert set(images.unique().tolist()) == {0.0, 1.0}  # the mean, in normalised space


def test_the_crop_is_normalised_and_mirrored(folder):
    """Without anything else a crop is some part of its image."""
    one = Augment(scale=(1.0, 1.0), ratio=(23 / 17, 23 / 17), flip=1.0, randaugment=None,
                  erasing=0.0, mix=0.0)  # fmt: skip
    data = shards(folder, augment=one)
    batch = batches(data, 1)[0]
    found = batch["views"]["train"][0, 0]
    image = Image.open(io.BytesIO(photo(int(batch["keys"][0][1:]))))
    small = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((SIZE, SIZE), 3)
    expected = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in (data.images.mean, data.images.std))
    expected = (expected - mean) / std
    assert (found - expected).abs().mean() < 0.1  # two libraries' bicubic
    assert (found.flip(2) - expected).abs().mean() > 0.3


def test_colours_change_where_there_is_no_randaugment(folder):
    colours = Photometric(grey=1.0)
    augment = Augment(randaugment=None, photometric=colours, erasing=0.0, mix=0.0)
    data = shards(
        folder, augment=augment, images=Images(size=SIZE, mean=(0.0,) * 3, std=(1.0,) * 3)
    )
    image = batches(data, 1)[0]["views"]["train"][0]
    torch.testing.assert_close(image[:, 0], image[:, 1], rtol=0, atol=0.01)


# ---- parts ------------------------------------------------------------------------------------


def test_a_part_of_the_images(folder):
    data = shards(folder, subset=Subset(per_class=2), augment=PLAIN)
    data.setup()
    assert data.num_train == 6
    seen = batches(data, 3)
    labels = torch.cat([b["label"] for b in seen])
    assert torch.bincount(labels).tolist() == [6, 6, 6]  # three epochs
    assert len({key for b in seen for key in b["keys"]}) == 6
    assert data.epoch_of(12) == 2
    assert sum(len(b["label"]) for b in data.clean_dataloader("train")) == 6


def test_a_checkpoint_remembers_the_part(folder):
    state = shards(folder, subset=Subset(per_class=2)).state_dict()
    shards(folder, subset=Subset(per_class=2)).load_state_dict(state)
    with pytest.raises(UserError, match=r"shard 0 was .*samples|another part of data.train"):
        shards(folder, subset=Subset(per_class=2, seed=5)).load_state_dict(state)
    whole = shards(folder).state_dict()
    whole["entries"] = state["entries"]
    with pytest.raises(UserError, match=r"another part of data.train than 2 images of each class"):
        shards(folder, subset=Subset(per_class=2)).load_state_dict(whole)


# ---- mistakes ---------------------------------------------------------------------------------


def test_data_that_cannot_be_used(folder, tmp_path):
    bare = write_tar(tmp_path / "bare" / "train-000000.tar", labelled(0, 5))
    with pytest.raises(UserError, match=r"has no index; fine-tuning counts epochs"):
        LabelledShards(str(bare)).setup()
    names = write_tar(tmp_path / "none" / "train-000000.tar", [("a.png", photo(1))])
    build_index([str(names)])
    with pytest.raises(UserError, match=r"data.train has no labels"):
        LabelledShards(str(names)).setup()
    build_index([str(write_tar(tmp_path / "val-000000.tar", labelled(0, 10, classes=5)))])
    with pytest.raises(UserError, match=r"data.val has images of classes 3, 4, data.train has no"):
        shards(folder, val=str(tmp_path / "val-000000.tar")).setup()
    mixed = [*labelled(0, 30), ("x.png", photo(77)), ("y.png", photo(78)), ("y.cls", b"9")]
    build_index([str(write_tar(tmp_path / "mixed" / "train-000000.tar", mixed))])
    images = Images(size=SIZE, resize=SIZE, classes=3)
    data = shards(tmp_path / "mixed", val=None, images=images, augment=PLAIN)
    labels = torch.cat([b["label"] for b in batches(data, 12)])
    assert labels.min() >= 0
    assert labels.max() <= 2
    assert set(data.faults) == {"missing key", "label"}


def test_augmentation_that_cannot_be(folder):
    with pytest.raises(UserError, match=r"batch_size is 5, but mixup and cutmix pair"):
        shards(folder, batch_size=5)
    assert shards(folder, batch_size=5, augment=PLAIN).batch_size == 5
    with pytest.raises(UserError, match=r"micro-batch, which has 3; set"):
        BatchAugment(Augment(), 3, seed=0)(torch.zeros(3, 3, 4, 4), torch.zeros(3).long(), 0)
    for wrong in ("autoaugment", "rand-x9", "rand-m9-n2x"):
        with pytest.raises(UserError, match=r"randaugment is '.*', which timm does not know"):
            shards(folder, augment=Augment(randaugment=wrong)).setup()
    for name, value in (("erasing", 1.5), ("smoothing", -0.1), ("mixup", -1.0)):
        with pytest.raises(UserError, match=rf"data.augment.{name} is {value}"):
            Augment(**{name: value})
    with pytest.raises(UserError, match=r"erasing_count is 0; it is 1 or more"):
        Augment(erasing_count=0)
    with pytest.raises(UserError, match=r"both randaugment and photometric"):
        Augment(photometric=Photometric(jitter=0.8))
    with pytest.raises(UserError, match=r"view: scale is \(0.0, 1.0\)"):
        shards(folder, augment=Augment(scale=(0.0, 1.0))).setup()


def test_words():
    assert Augment().about() == (
        "random crop 0.08-1, flip 0.5, rand-m9-mstd0.5-inc1, erasing 0.25 (pixel), mixup 0.8 and "
        "cutmix 1 (switch 0.5, probability 1, by batch), label smoothing 0.1"
    )
    assert PLAIN.about() == "random crop 0.08-1, flip 0.5, label smoothing 0"
    assert Subset(fraction=0.01).about() == "1 % of each class (seed 0)"
