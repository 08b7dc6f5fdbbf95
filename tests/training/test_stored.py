"""Features stored under a Lightning Trainer: once, whole, and the same from any number of ranks."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

from contramask.data.examples import Images
from contramask.data.index import build_index
from contramask.data.module import ImageShards
from contramask.data.procedural import write_shards
from contramask.data.streaming import Streaming
from contramask.data.subset import Subset, catalogue, choose
from contramask.data.tarwriter import TarWriter
from contramask.data.views import IMAGENET_MEAN as MEAN_OF
from contramask.data.views import IMAGENET_STD as STD_OF
from contramask.data.views import EvalView
from contramask.distributed import total
from contramask.probes import store_buffer
from contramask.probes.extraction import extract
from contramask.probes.features import Feature
from contramask.probes.grid_rows import Share
from contramask.probes.store_files import PassFolder
from contramask.training import stored as training_stored
from contramask.training.stored import Extraction, shelves_of, stored_features
from contramask.types import UserError
from tests.builders import tiny_vit
from tests.training.test_linear import trainer

pytestmark = [
    # pytorch-lightning's own use of torch.utils._pytree
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning"),
    # its processes are forked, which is the quickest way to have two
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

WANTED = [Feature(), Feature("block_00", "cls+mean", "none")]
MEAN = Feature("last", "mean")
IMAGES = {"train": 128, "val": 64}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("stored")
    return write_shards(folder, images=128, val_images=64, size=24, shards=3)


@pytest.fixture(scope="module")
def backbone():
    return tiny_vit(img_size=20).requires_grad_(requires_grad=False)


def module(shards, **options) -> ImageShards:
    settings = {"batch_size": 9, "workers": 0, "images": Images(size=20)} | options
    return ImageShards(shards["train"], val=shards["val"], **settings)


def stored(backbone, data, folder: Path, wanted=WANTED, *, limit=None, transform="t", **options):
    return stored_features(
        backbone, data, trainer(**options), wanted, folder=folder, limit=limit, transform=transform
    )


def same(one, other) -> bool:
    return all(
        one[s].keys == other[s].keys
        and torch.equal(one[s].y, other[s].y)
        and all(torch.equal(x, other[s].x[f]) for f, x in one[s].x.items())
        for s in ("train", "val")
    )


@pytest.fixture(scope="module")
def expected(backbone, shards, tmp_path_factory):
    """One process, no worker, no stop."""
    return stored(backbone, module(shards), tmp_path_factory.mktemp("expected"))


@pytest.fixture
def forwards(backbone):
    """How many images went through the backbone."""
    seen: list[int] = []
    hook = backbone.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    yield seen
    hook.remove()


def test_they_are_the_features_of_the_images(backbone, shards, expected):
    data = module(shards)
    for split, bank in expected.items():
        assert len(bank) == len(set(bank.keys)) == IMAGES[split]
        for feature in WANTED:
            x, y = extract(backbone, map_to(data, split), feature=feature)
            assert torch.equal(bank.x[feature], x)
            assert torch.equal(bank.y, y)


def map_to(data: ImageShards, split):
    return (data.to_device(batch, "cpu") for batch in data.clean_dataloader(split))


def test_stored_features_are_not_extracted_again(backbone, shards, tmp_path, forwards):
    first = stored(backbone, module(shards), tmp_path)
    assert sum(forwards) == 192
    again = stored(backbone, module(shards, batch_size=20, workers=2), tmp_path, [WANTED[1]])
    assert sum(forwards) == 192
    assert torch.equal(again["train"].x[WANTED[1]], first["train"].x[WANTED[1]])
    more = stored(backbone, module(shards), tmp_path, [MEAN, WANTED[0]])
    assert sum(forwards) == 2 * 192
    assert len(list(tmp_path.glob("train-*/pass-*/*.last-cls-final.npy"))) == 1
    assert set(more["val"].x) == {MEAN, WANTED[0]}


def test_anything_that_features_hang_on_gives_them_another_folder(backbone, shards, tmp_path):
    def folder(network=backbone, data=None, limit=None, transform="t", precision="32-true") -> Path:
        settings = {"limit": limit, "transform": transform, "precision": precision}
        data = data or module(shards)
        return shelves_of(network, data, folder=tmp_path, **settings)["train"].path

    heads = tiny_vit(img_size=20, timm={"num_heads": 4})
    assert all(torch.equal(v, heads.state_dict()[k]) for k, v in backbone.state_dict().items())
    coloured = Images(size=20, mean=(0.1, 0.2, 0.3))
    found = [
        folder(),
        folder(tiny_vit(img_size=20, seed=1)),
        folder(heads),
        folder(data=module(shards, images=coloured)),
        folder(transform="u"),
        folder(precision="bf16-mixed"),
        folder(limit=17),
        folder(limit=18),
        folder(limit=17, data=module(shards, seed=1)),
        folder(data=module({**shards, "train": shards["val"]})),
    ]
    bilinear = module(shards)
    bilinear.clean_view = EvalView(20, interpolation="bilinear", mean=MEAN_OF, std=STD_OF)
    found.append(folder(data=bilinear))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_stored, "MEANING", training_stored.MEANING + 1)
        found.append(folder())
        patch.undo()
        patch.setattr(training_stored, "version", lambda _: "0.0.1")
        found.append(folder())
    assert len(set(found)) == len(found)
    assert folder(data=module(shards, seed=1, batch_size=20, workers=3)) == found[0]
    shutil.copytree(Path(shards["train"]).parent, tmp_path / "moved")
    moved = {split: str(tmp_path / "moved" / Path(p).name) for split, p in shards.items()}
    assert folder(data=module(moved)) == found[0]


def test_a_cache_of_another_backbone_is_refused(backbone, shards, tmp_path):
    stored(backbone, module(shards), tmp_path / "a", [MEAN])
    other = tiny_vit(img_size=20, seed=1).requires_grad_(requires_grad=False)
    stored(other, module(shards), tmp_path / "b", [MEAN])
    (mine,), (theirs,) = (list((tmp_path / n).glob("train-*")) for n in "ab")
    shutil.rmtree(mine)
    shutil.copytree(theirs, mine)
    with pytest.raises(UserError, match="holds features of another backbone; they are not used"):
        stored(backbone, module(shards), tmp_path / "a", [MEAN])


class Died(BaseException):
    """Stands for kill -9."""


def die_after(monkeypatch, batches: int) -> None:
    """Each batch is a part, and after so many the process ends."""
    step, seen = Extraction.validation_step, iter(range(99))

    def one(self, *args) -> None:
        if next(seen) == batches:
            total(torch.zeros(1))  # no rank before the other
            raise Died
        step(self, *args)

    monkeypatch.setattr(Extraction, "validation_step", one)
    monkeypatch.setattr(store_buffer, "BYTES", 0)


@pytest.mark.parametrize("batches", [4, 17])
def test_after_a_stop_it_goes_on(backbone, shards, tmp_path, expected, forwards, batches):
    """In train, and in val, when train is done; then with other workers, the rest only."""
    with pytest.MonkeyPatch.context() as patch:
        die_after(patch, batches)
        with pytest.raises(Died):
            stored(backbone, module(shards), tmp_path)
    done = sum(forwards)
    assert done == {4: 36, 17: 128 + 18}[batches]
    found = stored(backbone, module(shards, workers=2), tmp_path)
    assert sum(forwards) == 192
    assert same(found, expected)


def test_two_ranks_are_one_process(backbone, shards, tmp_path, expected):
    found = stored(backbone, module(shards), tmp_path, devices=2, strategy="ddp_fork")
    assert same(found, expected)
    assert len(list(tmp_path.glob("train-*/pass-*/*-of-2-*.rows.npy"))) == 2


def test_what_two_ranks_began_one_finishes(backbone, shards, tmp_path, expected, forwards):
    with pytest.MonkeyPatch.context() as patch:
        die_after(patch, 5)  # of each
        with pytest.raises(BaseException, match=r"Died|terminated"):
            stored(backbone, module(shards), tmp_path, devices=2, strategy="ddp_fork")
    found = stored(backbone, module(shards), tmp_path)
    assert sum(forwards) == 192 - 2 * 5 * 9
    assert same(found, expected)


def test_shards_without_an_index(backbone, shards, tmp_path, expected):
    folder = Path(shards["train"]).parent
    bare = tmp_path / "bare"
    bare.mkdir()
    for tar in folder.glob("*.tar"):
        shutil.copy(tar, bare)
    there = {split: str(bare / Path(pattern).name) for split, pattern in shards.items()}
    images = Images(size=20, classes=64)
    with pytest.MonkeyPatch.context() as patch:
        die_after(patch, 4)
        with pytest.raises(Died):
            stored(backbone, module(there, images=images), tmp_path / "f")
    for name, devices in (("f", {}), ("two", {"devices": 2, "strategy": "ddp_fork"})):
        found = stored(backbone, module(there, images=images), tmp_path / name, **devices)
        assert found["train"].keys == expected["train"].keys
        for feature in WANTED:  # a batch ends with its shard, so sums have another order
            torch.testing.assert_close(
                found["train"].x[feature], expected["train"].x[feature], rtol=1e-4, atol=1e-5
            )


def test_an_empty_shard_adds_nothing(backbone, shards, tmp_path, expected):
    folder = Path(shards["train"]).parent
    for tar in sorted(folder.glob("train-*.tar")):
        shutil.copy(tar, tmp_path)
    TarWriter(tmp_path / "train-000003.tar").close()
    build_index(str(tmp_path / "train-*.tar"))
    there = {**shards, "train": str(tmp_path / "train-*.tar")}
    found = stored(backbone, module(there), tmp_path / "f")
    assert same(found, expected)


def test_labels_out_of_range_are_named(backbone, shards, tmp_path):
    data = module(
        shards, images=Images(size=20, classes=3), streaming=Streaming(max_bad=0.0, grace=0)
    )
    with pytest.raises(UserError, match=r"train000000 of .*: label \(26; labels are whole"):
        stored(backbone, data, tmp_path, [MEAN])


def test_a_trainer_that_leaves_images_out_is_refused(backbone, shards, tmp_path):
    with pytest.raises(UserError, match=r"limit_val_batches is 2; .* set that"):
        stored(backbone, module(shards), tmp_path, [MEAN], limit_val_batches=2)


def test_two_programs_do_not_write_into_one_folder(backbone, shards, tmp_path):
    stored(backbone, module(shards), tmp_path, [MEAN])
    folder = next(tmp_path.glob("val-*/pass-*"))
    (folder / "manifest.json").unlink()
    other = PassFolder(folder.parent, {}, [])
    other.path = folder
    with other.locked(), pytest.raises(UserError, match="another process extracts features into"):
        stored(backbone, module(shards), tmp_path, [MEAN])


def test_precision_is_the_trainers(backbone, shards, tmp_path, expected):
    """bfloat16 forwards, as `extract` has them."""
    found = stored(backbone, module(shards), tmp_path, [MEAN], precision="bf16-mixed")
    data = module(shards)
    x, _ = extract(backbone, map_to(data, "val"), feature=MEAN, autocast=True)
    exact, _ = extract(backbone, map_to(data, "val"), feature=MEAN)
    assert found["val"].x[MEAN].dtype == torch.float32
    assert torch.equal(found["val"].x[MEAN], x)
    assert not torch.equal(x, exact)


def test_train_alone_needs_no_val(backbone, shards, tmp_path, expected, forwards):
    """And goes on after a stop as two splits do; what is stored then is read with val."""
    alone = ImageShards(
        shards["train"], batch_size=9, workers=0, images=Images(size=20, classes=64)
    )
    options = {"folder": tmp_path, "transform": "t", "splits": ["train"]}
    with pytest.MonkeyPatch.context() as patch:
        die_after(patch, 4)
        with pytest.raises(Died):
            stored_features(backbone, alone, trainer(), WANTED, **options)
    found = stored_features(backbone, alone, trainer(), WANTED, **options)
    assert sum(forwards) == IMAGES["train"]
    assert list(found) == ["train"]
    assert found["train"].keys == expected["train"].keys
    for feature in WANTED:
        assert torch.equal(found["train"].x[feature], expected["train"].x[feature])
    (folder,) = tmp_path.glob("*-*")
    assert folder.name == found["train"].origin
    stored(backbone, module(shards, images=Images(size=20, classes=64)), tmp_path)
    assert sum(forwards) == IMAGES["train"] + 192 - 128


def test_a_share_has_the_images_of_a_subset(shards, expected):
    """`probe linear --fractions 0.3` and `finetune --subset 0.3`."""
    index, bank = module(shards).train_shards.index, expected["train"]
    assert index is not None
    known = catalogue(index)
    for part in ({"fraction": 0.3}, {"per_class": 1}):
        chosen = choose(Subset(**part), known)
        names = {known.keys[i] for i in chosen.nonzero()[0]}
        rows = Share(**part).of(bank.y, bank.keys, 0)
        assert {bank.keys[i] for i in rows.tolist()} == names
        assert 0 < len(names) < IMAGES["train"]


@pytest.mark.parametrize("ranks", [{}, {"devices": 2, "strategy": "ddp_fork"}])
def test_a_cache_that_cannot_be_written_is_named(backbone, shards, tmp_path, ranks):
    """On the first rank, and the others do not wait for it."""
    (tmp_path / "file").write_text("")
    told = r"cannot be written \(Not a directory\); set --cache|or it cannot be written; wait"
    wanted = (UserError, ProcessRaisedException)
    with pytest.raises(wanted, match=told):
        stored(backbone, module(shards), tmp_path / "file" / "features", [MEAN], **ranks)


def test_val_is_wanted(backbone, shards, tmp_path):
    data = ImageShards(shards["train"], images=replace(Images(), size=20))
    with pytest.raises(UserError, match=r"data\.val names no shards"):
        stored(backbone, data, tmp_path)
