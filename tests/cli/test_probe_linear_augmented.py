"""`contramask probe linear --preset`: the official protocols on small shards, whole and stopped."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml

from contramask.checkpoints.export import export_backbone
from contramask.cli import probe_linear, probe_linear_augmented
from contramask.cli.evaluation_suite import Entry
from contramask.cli.probe import main as probe
from contramask.cli.probe_linear_augmented import main, name_of, preset_in
from contramask.data.pack import ShardWriter
from contramask.models.vit import VisionTransformer
from contramask.probes.features import Feature
from contramask.probes.presets import PRESETS
from contramask.training.linear_augmented import LinearAugmented
from contramask.types import UserError

pytestmark = [
    # pytorch-lightning's own use of torch.utils._pytree
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning"),
    pytest.mark.filterwarnings(r"ignore:.*does not have many workers"),
]

QUICK = [
    "--trainer.accelerator", "cpu", "--data.workers", "0", "--data.batch_size", "32",
    "--recipe.epochs", "1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _no_handler_outlives_its_test():
    """It would write to a stream that pytest has closed."""
    yield
    own = logging.getLogger("contramask")
    own.handlers.clear()
    own.propagate = True


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    timm = {"embed_dim": 36, "depth": 3, "num_heads": 3}
    vit = VisionTransformer("vit_tiny_patch16_224", img_size=32, patch_size=8, timm=timm)
    data = {"mean": [0.5] * 3, "std": [0.25] * 3, "size": 32, "resize": 32}
    export_backbone(vit, folder, net="student", step=7, data=data)
    return folder


def result(run: Path, data: list[str], preset: str, *more: str) -> dict:
    before = set((run / "probes").glob("*.json"))
    main([str(run), "--preset", preset, *data, *QUICK, *more])
    (path,) = set((run / "probes").glob("*.json")) - before
    assert path.name.startswith(f"linear-{preset}-")  # of another length than the preset's
    return json.loads(path.read_text())


@pytest.mark.parametrize("preset", ["mae", "dinov2", "beit"])
def test_a_preset_from_command_to_file(run, data, capsys, preset: str):
    found = result(run, data, preset)
    assert found["probe"] == "linear"
    assert found["preset"] == preset
    assert (found["run"], found["step"]) == (str(run), 7)
    values, text = found["values"], found["protocol"]
    assert set(values) == {"top1", "top5", "rate", "images"}
    assert values["images"] == 64
    assert values["rate"] in PRESETS[preset].recipe.rates
    assert 0 <= values["top1"] <= values["top5"] <= 1
    assert found["training"] == {"steps": 8, "batch": 32, "idle": 0}
    for fact in (
        f"preset {preset} ({PRESETS[preset].source})", "x 32/256", "1 epochs of 256 train images",
        "batches of 32 (8 steps)", f"batch 32 (preset: {PRESETS[preset].recipe.batch})",
        "epochs 1 (preset:", "random resized crop of 32", "resize 32", "the authors' code differs",
        *PRESETS[preset].differs,
    ):  # fmt: skip
        assert fact in text, fact
    several = {"dinov2": 4 * 13, "beit": 3}.get(preset, 0)
    assert len(found["sweep"]) == several
    assert ("best on 10% of train" in text) == (several > 0)
    shown = capsys.readouterr().out
    assert f"{100 * values['top1']:.2f} %" in shown
    assert not list((run / "probes").glob(f".linear-{preset}*"))  # nothing is left to go on from


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> list[str]:
    """Shards of six colours under noise: 96 images of train, 42 of val."""
    folder, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    tones = 255 * np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0], [1, 1, 0], [0, 1, 1], [1, 0, 1]])
    options = []
    for split, count in (("train", 96), ("val", 42)):
        with ShardWriter(folder / split) as writer:
            for i in range(count):
                noise = rng.integers(0, 256, (32, 32, 3))
                picture = (0.6 * tones[i % 6] + 0.4 * noise).astype(np.uint8)
                png = cv2.imencode(".png", picture)[1].tobytes()
                writer.add(f"{split}{i:03d}", {"png": png, "cls": str(i % 6).encode()})
            writer.finish()
        options += [f"--data.{split}", str(folder / f"{split}-*.tar")]
    return options


@pytest.mark.parametrize(
    ("preset", "more"),
    [
        ("mocov3", ["--recipe.rates", "[3.0, 30.0]"]),
        ("simmim-like", ["--recipe.rates", "[0.3]", "--features", "[last/mean/final]"]),
    ],
)
def test_it_learns(run, colours, preset: str, more: list[str]):
    """Random features of colours, read by six epochs of six steps; chance names one of six."""
    sizes = ["--recipe.epochs", "6", "--data.batch_size", "16"]
    found = result(run, colours, preset, *sizes, *more)
    assert found["values"]["top1"] > 0.6
    assert found["training"]["steps"] == 36
    assert f"rates {tuple(json.loads(more[1]))} (preset: " in found["protocol"]
    assert ("features last/mean/final" in found["protocol"]) == (preset == "simmim-like")


def test_the_word_preset_leads_here(run, data, tmp_path):
    out = tmp_path / "there" / "x.json"
    probe(["linear", str(run), "--preset=mocov3", *data, *QUICK, "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["preset"] == "mocov3"
    assert "shape 3/4 to 4/3, bilinear)" in found["protocol"]
    assert "resize 32 (bilinear)" in found["protocol"]


def test_a_preset_in_a_yaml_leads_here_as_a_suite_has_it(run, data, shards, tmp_path):
    out, file = tmp_path / "x.json", tmp_path / "entry.yaml"
    entry = Entry(
        "mae", "probe linear", {"data.train": "train", "data.val": "val"},
        {"preset": "mae", "recipe": {"epochs": 1}, "data": {"workers": 0, "batch_size": 32}},
    )  # fmt: skip
    config = entry.config(shards, str(run), {"trainer": {"accelerator": "cpu"}})
    file.write_text(yaml.safe_dump({**config, "out": str(out)}))
    probe_linear.main(["-c", str(file)])
    assert json.loads(out.read_text())["preset"] == "mae"
    assert "preset" in probe_linear.build_parser().names()


def test_the_last_preset_counts(tmp_path):
    named, silent = tmp_path / "a.yaml", tmp_path / "b.yaml"
    named.write_text("preset: beit\nrun: x\n")
    silent.write_text("run: x\n")
    for words, found in (
        (["run"], None),
        (["run", "-c", str(silent)], None),
        (["run", f"--config={named}"], "beit"),
        (["-c", str(named), "--preset", "mae"], "mae"),
        (["--preset=mae", "-c", str(named), "-c", str(silent)], "beit"),
        (["-c", str(tmp_path / "missing.yaml"), "--preset", "mae"], "mae"),
        (["run", "--preset"], ""),
    ):
        assert preset_in(words) == found


def test_changes_of_a_preset_are_other_files(run):
    backbone = VisionTransformer("vit_tiny_patch16_224", img_size=32, patch_size=16)
    plain = PRESETS["mae"].recipe

    def name(recipe=plain, images=None, precision="32-true", pool="cls") -> str:
        module = LinearAugmented(
            backbone, recipe=recipe, features=(Feature(pool=pool),), classes=2, samples=9,
            batch_size=3,
        )  # fmt: skip
        return name_of("mae", module, {"images": images, "precision": precision})

    names = [
        name(), name(replace(plain, epochs=1)), name(images={"size": 16}),
        name(precision="bf16-mixed"), name(pool="mean"),
    ]  # fmt: skip
    assert names[0] == "linear-mae"
    assert len(set(names)) == len(names)


class Stopped(Exception):
    """In place of a signal."""


def test_a_stopped_probe_goes_on_and_ends_as_if_it_had_not_stopped(
    run, data, tmp_path, monkeypatch
):
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    options = [*data, *QUICK, "--every", "2", "--recipe.rates", "[0.3, 3.0]"]
    start = [str(run), "--preset", "mocov3", *options]
    main([*start, "--out", str(whole)])
    began = []

    class Stop(probe_linear_augmented.Told):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            began.append(trainer.global_step)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 5 and len(began) == 1:
                raise Stopped

    monkeypatch.setattr(probe_linear_augmented, "Told", Stop)
    with pytest.raises(Stopped):
        main([*start, "--out", str(parts)])
    assert not parts.exists()
    main([*start, "--out", str(parts)])
    assert began == [0, 4]
    assert json.loads(parts.read_text()) == json.loads(whole.read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts.json", "whole.json"]


@pytest.mark.parametrize("other", [["--data.batch_size", "64"], ["--images.mean", "[0.1,0.2,0.3]"]])
def test_with_another_batch_or_other_images_it_begins_anew(run, data, tmp_path, monkeypatch, other):
    out = ["--out", str(tmp_path / "x.json")]
    start = [str(run), "--preset", "mocov3", *data, *QUICK, "--every", "2", *out]
    steps = []

    class Stop(probe_linear_augmented.Told):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            steps.append((trainer.global_step, trainer.max_steps))
            if len(steps) == 2:
                raise Stopped

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                raise Stopped

    monkeypatch.setattr(probe_linear_augmented, "Told", Stop)
    for more in ([], other):
        with pytest.raises(Stopped):
            main([*start, *more])
    assert [first for first, _ in steps] == [0, 0]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--preset", "mea"], "preset is 'mea'; there are mae"),
        (["--preset"], "--preset needs a name; there are mae"),
        (["--preset", "mae", "--trainer.max_steps", "5"], "max_steps is 5; the length of a probe"),
        (["--preset", "mae", "--recipe.epochs", "0"], "epochs is 0; allowed is at least 1"),
        (["--preset", "mae", "--recipe.optimiser", "adam"], "optimiser"),
        (["--preset", "mae", "--features", "[last9/cls]"], "the backbone has 3 blocks"),
        (["--preset", "mae", "--data.batch_size", "1000"], "1 epochs of 256 images are no whole"),
        (["--preset", "mae", "--data.vall", "x"], "did you mean data.val"),
    ],
)
def test_mistakes_are_named(run, data, more: list[str], told: str):
    with pytest.raises(UserError, match=told.replace("(", r"\(")):
        main([str(run), *data, *QUICK, *more])


def test_missing_val_is_named(run, shards):
    with pytest.raises(UserError, match=r"data\.val names no shards; the probe is scored on them"):
        main([str(run), "--preset", "mae", "--data.train", shards["train"], *QUICK])
