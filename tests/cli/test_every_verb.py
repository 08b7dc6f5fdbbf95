"""Every verb of evaluation runs on real images, as one suite: small, from shards to the table."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from scripts.make_videos import make

from contramask.checkpoints.export import export_backbone
from contramask.cli import evaluate, pack
from contramask.models.vit import VisionTransformer

SHEET = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "size": 32, "resize": 32}
SHARDS = {"data.train": "train", "data.val": "val"}
DENSE = {"data.train": "dense_train", "data.val": "dense_val"}
QUICK = {"epochs": 2, "batch": 32, "rates": [0.1, 1.0]}
SUITE = {
    "linear": ("probe linear", SHARDS, {"pools": ["cls", "mean"], "recipe": QUICK, "limit": 96}),
    "knn": ("probe knn", SHARDS, {"metrics": ["cosine", "dot"], "ks": [1, 5], "limit": 96}),
    "finetune": (
        "finetune",
        SHARDS,
        {"preset": "vit_tiny_cifar10", "epochs": 0.05, "wandb": {"mode": "disabled"}},
    ),
    "patches": (
        "probe patches",
        DENSE,
        {"classes": 11, "ignore": 11, "tile": 96, "train_images": 4, "val_images": 2,
         "recipe": QUICK | {"batch": 64}},
    ),
    "retrieval": (
        "probe retrieval",
        SHARDS,
        {"queries": 24, "distractors": 16, "limit": 64, "warps": ["shift4", "noise20"]},
    ),
    "track": ("probe track", {"videos": "videos"}, {"resolution": "96p", "short_side": 96}),
    "degradations": (
        "probe robustness",
        SHARDS,
        {"degradations": ["clean", "noise20", "shuffle2"], "limit": 96, "recipe": QUICK},
    ),
    "cues": ("probe robustness", {"cue.data": "cue"}, {"recipe": QUICK, "limit": 320}),
}  # fmt: skip
COLUMNS = {
    "linear": "top1",
    "knn": "k5_top1",
    "finetune": "top1",
    "patches": "knn_miou",
    "retrieval": "images_map",
    "track": "jf_rate",
    "degradations": "noise20_top1",
    "cues": "shape_top1",
}


def indexed(source: Path, folder: Path) -> Path:
    """A copy of one shard of each split, with an index: fine-tuning counts epochs."""
    folder.mkdir()
    for name in ("train-000000.tar", "val-000000.tar", "classes.json"):
        shutil.copy(source / name, folder)
    pack.main(["index", *(str(path) for path in sorted(folder.glob("*.tar")))])
    return folder


@pytest.fixture(scope="module")
def table(shared_data, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("verbs")
    cifar = indexed(shared_data("cifar10"), folder / "cifar10")
    camvid, cue = (shared_data(name) for name in ("camvid", "cue-conflict"))
    make(shared_data("camvid").parent, folder / "videos", videos=1, frames=4, size=(96, 128))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = VisionTransformer(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            timm={"embed_dim": 24, "depth": 2, "num_heads": 3},
        )
    export_backbone(vit, folder / "run", net="student", step=1, data=SHEET)
    entries = {
        name: {"verb": verb, "needs": needs, "options": options, "columns": {name: COLUMNS[name]}}
        for name, (verb, needs, options) in SUITE.items()
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump({"entries": entries}, sort_keys=False))
    evaluate.main(
        [
            *(str(folder / "run"), "--suite", str(folder / "suite.yaml"), "--out", str(folder)),
            *("--data.train", str(cifar / "train-000000.tar")),
            *("--data.val", str(cifar / "val-000000.tar")),
            *("--data.dense_train", str(camvid / "train-000000.tar")),
            *("--data.dense_val", str(camvid / "val-000000.tar")),
            *("--data.cue", str(cue / "train-*.tar"), "--data.videos", str(folder / "videos")),
            *("--shared", "{trainer: {accelerator: cpu, devices: 1}, data: {workers: 0}}"),
        ]
    )
    return json.loads((folder / "evaluation.json").read_text())


def test_nothing_is_left_out(table):
    assert table["notes"] == []
    assert list(table["rows"][0]) == ["model", *SUITE]


@pytest.mark.parametrize("name", list(SUITE))
def test_a_verb_gives_a_fraction_and_says_how(table, name):
    assert 0 <= table["rows"][0][name] <= 1
    (protocol,) = table["protocols"][name]
    assert len(protocol) > 60
    assert table["results"]["run"][name]["backbone"] == table["results"]["run"]["knn"]["backbone"]
