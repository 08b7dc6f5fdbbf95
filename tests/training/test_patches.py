"""Probes of patches under a Lightning Trainer, alone and on two ranks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score

from contramask.data.dense import Dense
from contramask.probes.features import frozen, patch_features
from contramask.probes.linear import LinearRecipe
from contramask.probes.patches import PatchRecipe, SourceProbe
from contramask.training import patches
from contramask.training.patches import PatchEvaluation
from contramask.types import Spec, UserError
from tests.builders import tiny_vit
from tests.data.tars import write_tar
from tests.data.test_dense import CLASSES, DENSE, VOID, data_of, encoded, patterns, scene, shard
from tests.probes.tiny import TinyBackbone
from tests.training.test_linear import trainer

__all__ = ["patterns"]
pytestmark = [
    # pytorch-lightning's own use of torch.utils._pytree
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning"),
    # its processes are forked, which is the quickest way to have two
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

RECIPE = PatchRecipe(ks=(1, 3), recipe=LinearRecipe(rates=(0.1, 1.0), epochs=30, batch=32))


class Colours(TinyBackbone):
    """A patch is its mean colour, and the first tokens nothing."""

    def __init__(self):
        super().__init__()
        self.spec = Spec(dim=12, patch=4, grid=(2, 2), depth=1)
        torch.nn.init.zeros_(self.embed.weight)
        torch.nn.init.zeros_(self.embed.bias)
        for channel in range(3):
            self.embed.weight.data[channel, channel] = 1 / 16


def vit(**changes):
    return tiny_vit(img_size=8, patch_size=4, **changes)


def evaluated(module: PatchEvaluation, data, **options) -> dict:
    trainer(**options).validate(module, datamodule=data, verbose=False)
    return module.result


@pytest.fixture
def plain(tmp_path) -> dict[str, str]:
    """Scenes of 20 x 28 pixels: every patch has one colour, that of its class, or is all fill."""
    shard(tmp_path / "plain-train.tar", range(11), size=(20, 28))
    shard(tmp_path / "plain-val.tar", range(20, 25), size=(20, 28))
    return {split: str(tmp_path / f"plain-{split}.tar") for split in ("train", "val")}


# By the inner product a colour may be nearer to a brighter one than to itself.
FAIR = replace(RECIPE, metrics=("cosine", "l2"))


def test_where_colour_is_class_the_probes_are_perfect(plain):
    found = evaluated(PatchEvaluation(Colours(), DENSE, recipe=FAIR), data_of(plain))
    assert [row["miou"] for row in found["table"]] == [1.0] * (2 * 2 * 2 + 1)
    values = found["values"]
    assert list(values) == [
        "knn_miou", "knn_pixel_top1", "linear_miou", "linear_pixel_top1",
        "train_images", "train_patches", "images",
    ]  # fmt: skip
    assert values["knn_miou"] == values["linear_pixel_top1"] == 1.0
    assert values["train_patches"] == 11 * 5 * 7
    assert (values["train_images"], values["images"]) == (11, 5)
    assert found["absent"] == {"train": [], "val": []}
    assert found["table"][0]["iou"] == [1.0] * CLASSES
    for fact in ("11 train images with 385 labelled patches, 5 val images", "1/3-NN", "label 9"):
        assert fact in found["protocol"]


@pytest.mark.parametrize("edge", ["pad", "overlap"])
def test_its_numbers_are_those_of_masks_drawn_at_full_size(patterns, edge):
    """The whole way again, image by image, with one nearest neighbour by hand and scikit-learn."""
    dense = Dense(CLASSES, ignore=VOID, net=8, patch=4, tile=10, size=(23, 28), edge=edge)
    backbone, data = vit(), data_of(patterns, dense=dense, patches_per_image=20)
    recipe = PatchRecipe(metrics=("l2",), cleanings=("raw",), linear=())
    module = PatchEvaluation(backbone, dense, sources=("block_00",), norm="none", recipe=recipe)
    found = evaluated(module, data)
    bank, labels = [], []
    with frozen(backbone):
        for batch in map(data.finish, data.dense_dataloader("train")):
            x = patch_features(backbone, batch["tiles"], source="block_00", norm="none")
            bank.append(x[batch["labels"] >= 0])
            labels.append(batch["labels"][batch["labels"] >= 0])
        bank, labels, truth, drawn = torch.cat(bank), torch.cat(labels), [], []
        assert found["values"]["train_patches"] == len(bank) == 11 * 20
        for batch in map(data.finish, data.dense_dataloader("val")):
            x = patch_features(backbone, batch["tiles"], source="block_00", norm="none")
            predicted = labels[torch.cdist(x.flatten(0, 1), bank).argmin(1)]
            parts = predicted.split([4 * count for count in batch["counts"]])
            place = dense.tiling.patch_of_pixel(17, 26, seen=(23, 28))
            truth += [mask.flatten() for mask in batch["masks"]]
            drawn += [part[place].flatten() for part in parts]
    truth, drawn = torch.cat(truth).numpy(), torch.cat(drawn).numpy()
    known = truth >= 0
    assert known.sum() == 5 * 16 * 26  # every pixel once, but for a row of void
    iou = jaccard_score(truth[known], drawn[known], average=None)
    assert found["table"][0]["iou"] == pytest.approx(iou.tolist(), abs=1e-6)
    assert found["values"]["knn_miou"] == pytest.approx(iou.mean(), abs=1e-6)
    right = (truth == drawn)[known].mean()
    assert found["values"]["knn_pixel_top1"] == pytest.approx(right, abs=1e-6)
    assert 1.5 / CLASSES < right < 1


@pytest.mark.parametrize("val_images", [None, 1])
def test_two_ranks_count_what_one_counts(patterns, tmp_path, val_images):
    """Of one image of val the second rank has none at all; pictures come from whoever has them."""
    found = []
    for devices, strategy in ((1, "auto"), (2, "ddp_fork")):
        data = data_of(patterns, batch_size=2)
        data.val_images, data.pictures = val_images, True
        folder = tmp_path / str(devices)
        module = PatchEvaluation(
            vit(), DENSE, sources=("last", "block_00"), recipe=RECIPE, pictures=(folder, 4)
        )
        options = {"devices": devices, "strategy": strategy}
        (logged, *_) = trainer(**options).validate(module, datamodule=data, verbose=False)
        found.append(logged)
    assert found[0] == found[1]  # to the last bit
    assert found[1]["patches/images"] == (val_images or 5)
    pictures = [sorted(p.name for p in (tmp_path / n).iterdir()) for n in ("1", "2")]
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) == min(4, val_images or 5)
    for name in pictures[0]:
        one, two = (np.array(Image.open(tmp_path / n / name)) for n in ("1", "2"))
        assert np.array_equal(one, two)


def test_under_autocast_features_are_coarse_and_probes_are_not(patterns, monkeypatch):
    """Heads as they are trained and score outside of it, on the features that it gave."""
    made, asked = [], []

    class Seen(SourceProbe):
        def __init__(self, x, y, image, **options):
            super().__init__(x, y, image, **options)
            made.append((self, x.clone(), y, image))

        def predict(self, x):
            found = super().predict(x)
            asked.append((x, found))
            return found

    monkeypatch.setattr(patches, "SourceProbe", Seen)
    recipe = replace(RECIPE, metrics=("dot",), cleanings=("pca",), linear=("pca", "raw"))
    module = PatchEvaluation(vit(), DENSE, recipe=recipe)
    found = evaluated(module, data_of(patterns), precision="bf16-mixed")
    assert found["protocol"].endswith(", precision bf16-mixed")
    ((probe, x, y, image),) = made
    again = SourceProbe(x, y, image, classes=CLASSES, recipe=recipe)
    for word, head in again.heads.items():
        assert torch.equal(probe.heads[word].weight, head.weight)
    assert len(asked) == 2
    for rows, predicted in asked:
        expected = again.predict(rows)
        assert all(torch.equal(predicted[cell], expected[cell]) for cell in expected)
    exact = PatchEvaluation(vit(), DENSE, recipe=recipe)
    assert "precision" not in evaluated(exact, data_of(patterns))["protocol"]
    assert not torch.equal(made[1][1], x)  # the features themselves are of bfloat16


def test_classes_that_a_split_lacks_are_told(tmp_path, patterns):
    """Class 3 is not in train, and neither 0 nor 5 in val: 5 is nowhere and has no score."""
    for split, swap in (("train", (3, 1)), ("val", (0, 1))):
        parts = []
        for n in range(6):
            picture, mask = scene(n)
            mask = np.where(mask == swap[0], swap[1], mask).astype(np.uint8)
            parts += [(f"{n}.png", encoded(picture)), (f"{n}.seg.png", encoded(mask))]
        write_tar(tmp_path / f"few-{split}.tar", parts)
    data = {split: str(tmp_path / f"few-{split}.tar") for split in ("train", "val")}
    dense = Dense(6, ignore=VOID, net=8, patch=4)
    names = ["a", "b", "c", "d", "e", "f"]
    found = evaluated(
        PatchEvaluation(Colours(), dense, recipe=RECIPE, names=names), data_of(data, dense=dense)
    )
    assert found["absent"] == {"train": ["d", "e", "f"], "val": ["a", "e", "f"]}
    iou = found["table"][0]["iou"]
    assert iou[3] == 0.0  # in val, and never predicted
    assert iou[0] == 0.0  # predicted, and not in val
    assert iou[4:] == [None, None]
    assert found["table"][0]["miou"] == pytest.approx(sum(iou[:4]) / 4, abs=1e-6)


def test_train_without_a_label_has_no_probe(tmp_path, patterns):
    blank = encoded(np.full((17, 26), VOID, np.uint8))
    shard(tmp_path / "blank.tar", [1], seg_png=blank)
    for split, told in (("train", "no patch of train has a label"), ("val", "no labelled pixel")):
        data = data_of(patterns | {split: str(tmp_path / "blank.tar")})
        with pytest.raises(UserError, match=told):
            evaluated(PatchEvaluation(Colours(), DENSE, recipe=RECIPE), data)


def test_what_cannot_be_evaluated_is_refused_at_once():
    with pytest.raises(UserError, match="no source is given"):
        PatchEvaluation(Colours(), DENSE, sources=())
    with pytest.raises(UserError, match="the backbone has 1 blocks"):
        PatchEvaluation(Colours(), DENSE, sources=("block_03",))
    with pytest.raises(UserError, match=r"classes is 4, and classes.json .* names 3"):
        PatchEvaluation(Colours(), DENSE, names=["a", "b", "c"])


def test_a_picture_shows_image_truth_and_predictions(plain, tmp_path: Path):
    data, folder = data_of(plain), tmp_path / "drawn"
    data.pictures = True
    evaluated(PatchEvaluation(Colours(), DENSE, recipe=FAIR, pictures=(folder, 1)), data)
    (path,) = folder.iterdir()
    assert path.name == "s020.png"
    sheet = np.array(Image.open(path))
    width, height = 420, 300
    assert sheet.shape[1] == 10 + 4 * (width + 10)
    panels = [sheet[26 : 26 + height, 10 + i * 430 : 430 + i * 430] for i in range(4)]
    # The first of 20 rows of the truth is void; below it truth and both predictions are one.
    assert (panels[1][:15] == 40).all()
    assert (panels[1][15:] != 40).any(2).all()
    assert np.array_equal(panels[1][15:], panels[2][15:])
    assert np.array_equal(panels[1][15:], panels[3][15:])
    assert not np.array_equal(panels[0][15:], panels[1][15:])
