"""Accuracies on degraded images, and both cues under a Trainer, alone and on two ranks."""

import json
import os
import socket
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from contramask import distributed
from contramask.data.cues import CueShards, NamedShards
from contramask.data.examples import Images
from contramask.data.index import build_index
from contramask.functional.degradations import Degradation
from contramask.probes.extraction import extract
from contramask.probes.features import CLEAN, Feature
from contramask.probes.knn import KNN
from contramask.probes.linear import LinearProbe, LinearRecipe
from contramask.probes.parts import Parts
from contramask.training.cues import CueStudy, shape_and_texture
from contramask.training.passes import Reader
from contramask.training.robustness import Sweep, degraded_accuracies
from contramask.types import Batch, UserError, fold
from tests.data.tars import photo, write_tar
from tests.probes.tiny import CLASSES, SIZE, Loader, TinyBackbone, TinyData
from tests.training.test_linear import trainer

pytestmark = [
    # pytorch-lightning's own use of torch.utils._pytree
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning"),
    # processes are forked, which is the quickest way to have two
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

RECIPE = LinearRecipe(rates=(0.03, 1.0), epochs=12, batch=16)
MEAN, STD = (0.4, 0.5, 0.3), (0.25, 0.2, 0.3)
WORDS = ["noise40", "clean", "freq0.5eps3", "shuffle2", "noise40.0"]
FEATURE = Feature(pool="mean")


class KeyedData(TinyData):
    """Batches whose images have names, and a memory of what was asked for."""

    def __init__(self, *, order: int = 1, fails: int = 99, **options):
        super().__init__(**options)
        self.order, self.left, self.asked = order, fails, []

    def clean_dataloader(self, split: str, limit: int | None = None) -> Loader:
        self.rank, self.world = distributed.rank(), distributed.world()
        self.asked.append(split)
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        rank, world, self.rank, self.world = self.rank, self.world, 0, 1
        found = [self._named(b, split, i) for i, b in enumerate(super().clean_dataloader(split))]
        return Loader(found[:: self.order][rank::world])

    @staticmethod
    def _named(batch: Batch, split: str, number: int) -> Batch:
        return {**batch, "keys": [f"{split}{number}-{i}" for i in range(len(batch["label"]))]}


def sweep(words=WORDS, **options) -> Sweep:
    options = {"recipe": RECIPE, "feature": FEATURE, "k": 4} | options
    return Sweep(words, SIZE[0], MEAN, STD, **options)


def measure(data=None, backbone=None, parts: Parts | None = None, **options) -> dict:
    return degraded_accuracies(
        trainer(), backbone or TinyBackbone(), data or KeyedData(), sweep(**options), parts=parts
    )


def test_its_numbers_are_those_of_probes_on_features_of_degraded_images():
    backbone, data = TinyBackbone(), KeyedData()
    found = measure(data, backbone)
    assert data.asked == ["train", "val", "val", "val", "val"]  # noise40.0 is noise40
    batches = list(data.clean_dataloader("train"))
    x, y = extract(backbone, batches, feature=FEATURE)
    order = torch.tensor([fold(key) for b in batches for key in b["keys"]]).argsort()
    linear, knn = LinearProbe(x.shape[1], CLASSES, recipe=RECIPE), KNN(CLASSES, ks=(4,))
    for probe in (linear, knn):
        probe.fit(x[order], y[order])
    shift, scale = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    for word in ("clean", "noise40", "freq0.5eps3", "shuffle2"):
        hits = {"top1": 0.0, "k4_top1": 0.0}
        for batch in data.clean_dataloader("val"):
            pixels = batch["views"][CLEAN][0] * scale + shift
            bad = Degradation.parse(word)(pixels, batch["keys"], std=STD)
            bad = {**batch, "views": {CLEAN: ((bad - shift) / scale)[None]}}
            v, w = extract(backbone, [bad], feature=FEATURE)
            hits["top1"] += (linear.predict(v).argmax(1) == w).sum().item()
            hits["k4_top1"] += (knn.predict(v).argmax(1) == w).sum().item()
        for name, count in hits.items():
            assert found["values"][f"{word}_{name}"] == pytest.approx(count / 17, abs=1e-6)
    assert found["values"]["images"] == 17
    assert len({found["values"][f"{word}_top1"] for word in ("clean", "noise40", "shuffle2")}) > 1


def test_the_table_says_what_was_lost_and_the_protocol_how():
    found = measure()
    table = {row["word"]: row for row in found["degradations"]}
    assert list(table) == ["clean", "noise40", "freq0.5eps3", "shuffle2"]
    clean = table["clean"]["top1"]
    for row in table.values():
        assert row["relative_drop"] == pytest.approx((clean - row["top1"]) / clean)
    assert table["clean"]["relative_drop"] == 0
    assert "sigma 40/255" in table["noise40"]["about"]
    for fact in (
        "best of 2 on 10% of train", "k-NN: cosine, k = 4", "mean of patches", "17 val images",
        "mean (0.4, 0.5, 0.3) and std (0.25, 0.2, 0.3)", "seed 0, key of the image, word",
    ):  # fmt: skip
        assert fact in found["protocol"]
    json.dumps(found, allow_nan=False)


def test_neither_the_order_of_batches_nor_the_backbone_s_mode_matters():
    backbone = TinyBackbone().train()
    assert measure(backbone=backbone) == measure(KeyedData(order=-1))
    assert backbone.training
    assert measure(seed=1)["values"] != measure()["values"]


class Restarting(KeyedData):
    """Shards whose keys begin anew."""

    def clean_dataloader(self, split: str, limit: int | None = None) -> Loader:
        self.place = 0
        return super().clean_dataloader(split, limit)

    def _named(self, batch: Batch, split: str, number: int) -> Batch:
        size, place = len(batch["label"]), self.place
        self.place += size
        return {**batch, "keys": [str(i) for i in range(size)], "position": place}


def test_images_of_equal_keys_stand_as_the_sweep_has_them():
    one, other = (
        Reader(TinyBackbone(), feature=FEATURE).over(trainer(), Restarting(order=order), "train")
        for order in (1, -1)
    )
    assert torch.equal(one.x, other.x)
    assert torch.equal(one.y, other.y)
    batches = list(Restarting().clean_dataloader("train"))
    x, y = extract(TinyBackbone(), batches, feature=FEATURE)
    places = sorted(
        (fold(str(i)), b["position"] + i) for b in batches for i in range(len(b["keys"]))
    )
    order = torch.tensor([place for _, place in places])
    assert torch.equal(one.x, x[order])
    assert torch.equal(one.y[:, 0], y[order])


def test_under_autocast_features_are_coarse_and_all_else_is_not(written, monkeypatch):
    seen = []

    def watched(method):
        def call(self, *values, **options):
            seen.append((method.__name__, torch.is_autocast_enabled("cpu")))
            return method(self, *values, **options)

        return call

    for kind, name in ((LinearProbe, "learn"), (LinearProbe, "heads"), (KNN, "votes")):
        monkeypatch.setattr(kind, name, watched(getattr(kind, name)))
    monkeypatch.setattr(Degradation, "of_normalised", watched(Degradation.of_normalised))
    coarse = degraded_accuracies(
        trainer(precision="bf16-mixed"), TinyBackbone(), KeyedData(), sweep()
    )
    assert coarse["protocol"].endswith(", precision bf16-mixed")
    assert set(seen) == {(n, False) for n in ("learn", "heads", "votes", "of_normalised")}
    seen.clear()
    cues = both(written, photos=True, made=trainer(precision="bf16-mixed"))
    assert cues["protocol"].endswith(", precision bf16-mixed")
    assert set(seen) == {("learn", False), ("heads", False)}
    rows = [
        Reader(TinyBackbone(), feature=FEATURE).over(trainer(precision=p), KeyedData(), "val").x
        for p in ("bf16-mixed", "32-true")
    ]
    assert not torch.equal(*rows)
    torch.testing.assert_close(*rows, rtol=0.05, atol=0.05)
    assert "precision" not in both(written)["protocol"]


def test_a_stopped_sweep_goes_on_where_it_was(tmp_path):
    straight = measure()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        measure(KeyedData(fails=4), parts=Parts(tmp_path / "parts", "a"))
    data = KeyedData()
    assert measure(data, parts=Parts(tmp_path / "parts", "a")) == straight
    assert data.asked == ["train", "val", "val"]  # two of four degradations were done
    data = KeyedData()
    assert measure(data, parts=Parts(tmp_path / "parts", "a")) == straight
    assert data.asked == []
    measure(data, words=["blur1"], parts=Parts(tmp_path / "parts", "a"))
    assert data.asked == ["train", "val"]  # clean is done
    measure(data, parts=Parts(tmp_path / "parts", "b"))
    assert len(data.asked) == 7  # of other settings nothing is


def test_clean_is_always_measured():
    assert next(iter(measure(words=["shuffle2"])["values"])) == "clean_top1"


@pytest.mark.parametrize("word", ["fog", "shuffle3", "lowpass6"])
def test_words_are_refused_before_anything_is_read(word: str):
    data = KeyedData()
    with pytest.raises(UserError, match=word):
        measure(data, words=[word])
    assert data.asked == []


def test_images_without_names_are_refused():
    with pytest.raises(UserError, match="the batches have no `keys`"):
        measure(TinyData())


class OneSplit(KeyedData):
    """Batches of one split changed."""

    def __init__(self, split: str, label: int):
        super().__init__()
        self.split, self.label = split, label

    def clean_dataloader(self, split: str, limit: int | None = None) -> Loader:
        found = super().clean_dataloader(split, limit)
        for batch in found.batches if split == self.split else []:
            batch["label"] = torch.full_like(batch["label"], self.label)
        return found


@pytest.mark.parametrize(
    ("split", "label", "told"),
    [
        ("train", -1, r"data.train has images of 0 class\(es\)"),
        ("train", 3, r"data.train has images of 1 class\(es\)"),
        ("val", -1, "no image of val has a label"),
    ],
)
def test_labels_that_cannot_be_learnt_are_named(split: str, label: int, told: str):
    with pytest.raises(UserError, match=told):
        measure(OneSplit(split, label))


def test_classes_that_train_has_not_are_missed():
    found = measure(OneSplit("val", CLASSES + 3))
    assert found["values"]["clean_top1"] == 0
    assert {row["relative_drop"] for row in found["degradations"]} == {None}


# ---- shape and texture ----------------------------------------------------------------------

NAMES = ["bear", "cat", "dog", "oven"]
PHOTOGRAPHS = ["fish", "dog", "bear", "cat"]  # other numbers, and no oven
SQUARE = 8
BOTH = {"recipe": LinearRecipe(rates=(0.3,), epochs=10), "feature": FEATURE, "folds": 3}


def write_cues(folder: Path, *, sources: bool = True) -> dict[str, str]:
    """49 images, 36 of them conflicts, and 40 photographs of four classes."""
    members, photos = [], []
    pairs = [(s, t) for s in range(4) for t in range(4) for _ in range(3)] + [(1, 1)]
    for n, (s, t) in enumerate(pairs):
        key = f"{NAMES[s]}{n % 5}-{NAMES[t]}{n % 4}" if sources else f"{n:04d}"
        key = f"{n}/{key}"  # the same pictures come twice
        pair = json.dumps({"shape": s, "texture": NAMES[t]}).encode()
        members += [(f"{key}.png", photo(n)), (f"{key}.json", pair)]
    for n in range(40):
        photos += [(f"p{n}.png", photo(100 + n)), (f"p{n}.cls", b"%d" % (n % 4))]
    found = {}
    for name, content, names in (("cue", members, NAMES), ("photos", photos, PHOTOGRAPHS)):
        path = write_tar(folder / name / "train-0.tar", content)
        (path.parent / "classes.json").write_text(json.dumps(names))
        build_index([str(path)])
        found[name] = str(path)
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, str]:
    return write_cues(tmp_path_factory.mktemp("cues"))


def both(
    paths: dict[str, str],
    *,
    photos: bool = False,
    parts: Parts | None = None,
    made: pl.Trainer | None = None,
    **options,
):
    shared = {"images": Images(size=SQUARE, resize=SQUARE), "workers": 0, "batch_size": 6}
    return shape_and_texture(
        made or trainer(),
        TinyBackbone(),
        CueShards(paths["cue"], option="cue.data", **shared),
        CueStudy(**(BOTH | options)),
        photographs=NamedShards(paths["photos"], option="cue.train", **shared) if photos else None,
        parts=parts,
    )


def test_both_cues_are_read_from_conflicts_alone(written):
    found = both(written)
    values, cues = found["values"], found["cues"]
    assert (cues["images"], cues["conflict"], values["cue_images"]) == (49, 36, 36)
    assert list(cues["splits"]) == ["source", "other", "random"]
    for cue in ("shape", "texture"):
        chosen = cues["splits"]["source"][cue]
        assert values[f"{cue}_top1"] == chosen["top1"]
        assert chosen["top1"] == pytest.approx(sum(chosen["folds"]) / 3, abs=1e-6)
        assert chosen["chance_top1"] == values[f"{cue}_chance_top1"] == 0.25
    total = values["shape_top1"] + values["texture_top1"]
    assert values["decodability_shape_share"] == pytest.approx(
        values["shape_top1"] / total, abs=1e-6
    )
    assert "shape_bias_rate" not in values
    for fact in ("36 of 49 images", "3-fold", "no source picture", "no shape bias"):
        assert fact in found["protocol"]
    other = both(written, split="other")
    assert other["values"]["shape_top1"] == cues["splits"]["other"]["shape"]["top1"]
    assert "no class of the other cue" in other["protocol"]


def test_shape_bias_is_that_of_a_probe_of_photographs_with_the_same_names(written):
    found = both(written, photos=True)
    shared = {"images": Images(size=SQUARE, resize=SQUARE), "workers": 0, "batch_size": 6}
    photos = NamedShards(written["photos"], option="cue.train", **shared)
    read = Reader(TinyBackbone(), feature=FEATURE).over(trainer(), photos, "train")
    names = [PHOTOGRAPHS[i] for i in read.y[:, 0]]
    kept = torch.tensor([name in NAMES for name in names])
    y = torch.tensor([NAMES.index(name) for name in names if name in NAMES])
    assert sorted(set(y.tolist())) == [0, 1, 2]  # no photograph of an oven
    probe = LinearProbe(read.x.shape[1], 3, recipe=BOTH["recipe"])
    probe.fit(read.x[kept], y)
    decisions = {"shape": 0, "texture": 0, "neither": 0}
    cues = CueShards(written["cue"], option="cue.data", **shared)
    for raw in cues.clean_dataloader("train"):
        batch = cues.to_device(raw, "cpu")
        v, shape = extract(TinyBackbone(), [batch], feature=FEATURE)
        for d, s, t in zip(probe.predict(v).argmax(1), shape, batch["texture"], strict=True):
            if s != t and s < 3 and t < 3:
                which = "shape" if d == s else "texture" if d == t else "neither"
                decisions[which] += 1
    bias = found["shape_bias"]
    assert {name: bias[name] for name in decisions} == decisions
    assert sum(decisions.values()) == 18
    assert bias["classes"] == ["bear", "cat", "dog"]
    of_both = decisions["shape"] + decisions["texture"]
    assert found["values"]["shape_bias_rate"] == pytest.approx(
        decisions["shape"] / of_both, abs=1e-6
    )
    assert found["values"]["cue_decided_rate"] == pytest.approx(of_both / 18, abs=1e-6)
    for name in decisions:
        assert sum(part[name] for part in bias["by_shape"].values()) == decisions[name]
    assert "18 images both of whose cues are among bear, cat, dog" in found["protocol"]


def test_finished_halves_are_not_read_again(written, tmp_path, monkeypatch):
    first = both(written, parts=Parts(tmp_path / "p", "a"))
    monkeypatch.setattr(Reader, "over", lambda *_: pytest.fail("read again"))
    assert both(written, parts=Parts(tmp_path / "p", "a")) == first


def test_a_split_that_nobody_asked_for_is_skipped_and_told(written, tmp_path):
    found = both(written, folds=20, parts=Parts(tmp_path / "p", "a"))
    assert list(found["cues"]["splits"]) == ["random"]
    assert list(found["cues"]["skipped"]) == ["source", "other"]
    told = "the split 'other' is not measured: there are 4 groups of images that stay together"
    assert told in found["protocol"]
    assert "dealt at random" in found["protocol"]
    assert both(written, folds=4, split="other")["cues"]["skipped"] == {}
    # What is kept was measured when nobody asked.
    with pytest.raises(UserError, match=r"'source', but .* groups .* for 20 folds"):
        both(written, folds=20, split="source", parts=Parts(tmp_path / "p", "a"))


def test_what_cannot_be_compared_is_told(written, tmp_path):
    bare = write_cues(tmp_path, sources=False)
    assert list(both(bare)["cues"]["splits"]) == ["other", "random"]
    with pytest.raises(UserError, match="keys do not name the pictures as in cat3-dog2"):
        both(bare, split="source")
    with pytest.raises(UserError, match=r"cue.folds is 1; allowed are 2 and more"):
        CueStudy(folds=1)
    with pytest.raises(UserError, match="36 images with a conflict for 50 folds"):
        both(written, folds=50)
    with pytest.raises(UserError, match=r"'other', but there are 4 groups .* for 20 folds"):
        both(written, folds=20, split="other")
    folder = Path(bare["photos"]).parent
    (folder / "classes.json").write_text(json.dumps(["a", "b", "c", "dog"]))
    with pytest.raises(UserError, match=r"cue.train: 1 of its classes have names that cue.data"):
        both(bare, photos=True)


# ---- two ranks ------------------------------------------------------------------------------


def on_a_rank(index: int, port: int, folder: str, paths: dict[str, str]) -> None:
    place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {k: str(v) for k, v in place.items()}
    # As torchrun would: Lightning then starts no processes of its own.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}
    dist.init_process_group("gloo")
    ddp = {"devices": 2, "strategy": "ddp"}
    # The first rank alone knows that `clean` is done.
    parts = Parts(Path(folder) / "parts", "a") if index == 0 else None
    found = degraded_accuracies(trainer(**ddp), TinyBackbone(), KeyedData(), sweep(), parts=parts)
    shared = {"images": Images(size=SQUARE, resize=SQUARE), "workers": 0, "batch_size": 6}
    cues = shape_and_texture(
        trainer(**ddp),
        TinyBackbone(),
        CueShards(paths["cue"], option="cue.data", **shared),
        CueStudy(**BOTH),
        photographs=NamedShards(paths["photos"], option="cue.train", **shared),
    )
    (Path(folder) / f"{index}.json").write_text(json.dumps([found, cues]))
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_find_what_one_finds(written, tmp_path):
    measure(words=[], parts=Parts(tmp_path / "parts", "a"))
    alone = [measure(), both(written, photos=True)]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    arguments = (port, str(tmp_path), written)
    mp.start_processes(on_a_rank, arguments, nprocs=2, start_method="fork")
    first, second = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    assert first == alone
    assert second == [{}, {}]  # the first rank has the result
