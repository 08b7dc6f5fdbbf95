"""`contramask finetune` from the command line: presets, parts, going on, what it leaves."""

import json
import os
import signal

import pytest
import pytorch_lightning as pl
import torch
import yaml

from contramask.callbacks.analysis import AnalysisCallback
from contramask.callbacks.signals import inbox
from contramask.checkpoints.classifiers import HEAD_SHEET, load_classifier, save_classifier
from contramask.checkpoints.export import export_backbone, load_backbone
from contramask.cli.finetune import build_parser, main, presets
from contramask.data.augmenting import BatchAugment, RandAugment
from contramask.data.examples import Images
from contramask.data.module import ImageShards
from contramask.models.classifier import Classifier, tunable
from contramask.schedule import at
from contramask.tracking.jsonl import read_metrics
from contramask.training.finetuning import FineTuning
from contramask.types import UserError
from tests.builders import randn, tiny_vit
from tests.conftest import REPO

PRESETS = sorted((REPO / "configs" / "finetune").glob("*.yaml"))
SIDE = 16
FED = {"size": SIDE, "resize": SIDE, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.3]}


class Terminate(pl.Callback):
    """Sends this process SIGTERM in the third update, as a scheduler would."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    vit = tiny_vit(img_size=SIDE, positions="sincos")
    export_backbone(vit, folder, net="student", step=9, data=FED)
    return folder


@pytest.fixture
def command(run, data, tmp_path):
    """A short fine-tuning: 256 images of 64 classes, 8 updates."""
    quick = ["--data.workers", "0", "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps"]
    return [
        *(str(run), "--preset", "vit_tiny_cifar10", *data, "--data.batch_size", "32", *quick, "1"),
        *("--epochs", "1", "--root", str(tmp_path), "--name", "tuned", "--wandb.mode", "disabled"),
    ]


def state_of(folder):
    """Weights, average and moments of the last checkpoint."""
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    moments = saved["optimizer_states"][0]["state"]
    flat = {f"{i}.{k}": v for i, each in moments.items() for k, v in each.items()}
    return saved["state_dict"] | flat


# ---- presets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.stem)
def test_every_preset_builds(preset, tmp_path):
    """All of it, on a small backbone of its kind."""
    parser = build_parser()
    text = ["--run", "r", "-c", str(preset), "--data.train", "a.tar", "--data.val", "b.tar"]
    parts = parser.build(parser.parse_args(text))
    positions = "relative" if preset.stem.startswith(("beit", "simmim")) else "sincos"
    backbone = tiny_vit(img_size=SIDE, positions=positions)
    module = FineTuning(backbone, 7, size=SIDE, **parts.model.as_dict())
    groups = module.optim.groups(module.trained())
    decayed = {n for g in groups if g["decay_factor"] for n in g["names"]}
    assert "head.weight" in decayed
    assert not any("pos_embed" in n or "cls_token" in n or n[-4:] == "bias" for n in decayed)
    if positions == "relative":  # of each block, decayed, and with the block's rate
        rates = {n: g["lr_factor"] for g in groups for n in g["names"]}
        tables = [n for n in rates if "relative_position_bias_table" in n]
        assert [rates[n] for n in sorted(tables)] == pytest.approx([0.65**2, 0.65])
        assert set(tables) <= decayed
    augment = parts.data.augment
    BatchAugment(augment, 7, seed=0)(torch.zeros(4, 3, 8, 8), torch.zeros(4).long(), 0)
    RandAugment(augment.randaugment, size=8, mean=(0.5,) * 3, interpolation="bicubic")
    assert at(module.optim.lr, 1.0) == pytest.approx(module.optim.lr.end)


def test_the_numbers_of_mae_for_vit_b():
    """By hand: a base rate of 5e-4 for 256 images, five of 100 epochs of warm-up, and so on."""
    parser = build_parser()
    path = REPO / "configs" / "finetune" / "mae_vit_b16.yaml"
    parts = parser.build(parser.parse_args(["--run", "r", "-c", str(path), "--data.train", "a"]))
    module = FineTuning(tiny_vit(img_size=SIDE), 7, size=SIDE, **parts.model.as_dict())
    optimizer = module.configure_optimizers()
    for epoch, rate in ((0, 0.0), (2.5, 1e-3), (5, 2e-3), (100, 1e-6)):
        assert module.optim.set(optimizer, epoch / 100, 1024) == pytest.approx(rate)
    middle = 1e-6 + (2e-3 - 1e-6) / 2  # half-way down the cosine, 47.5 epochs after the warm-up
    assert module.optim.set(optimizer, 0.525, 1024) == pytest.approx(middle)
    assert module.optim.set(optimizer, 0.525, 256) == pytest.approx(middle / 4)
    rates = {n: g["lr"] / middle * 4 for g in optimizer.param_groups for n in g["names"]}
    assert rates["head.weight"] == pytest.approx(1)
    assert rates["backbone.vit.patch_embed.proj.weight"] == pytest.approx(0.65**3)  # 2 blocks here
    assert parts.epochs == 100
    optim, augment = module.optim, parts.data.augment
    assert (optim.decay, optim.betas, optim.layer_decay) == (0.05, (0.9, 0.999), 0.65)
    assert (optim.name, optim.clip, module.ema) == ("adamw", None, None)
    assert (module.classifier.pool, parts.model.drop_path) == ("mean", 0.1)
    assert parts.model.head_std == 2e-5
    assert augment.randaugment == "rand-m9-mstd0.5-inc1"
    assert (augment.mixup, augment.cutmix, augment.switch, augment.mix) == (0.8, 1.0, 0.5, 1.0)
    assert (augment.smoothing, augment.erasing, augment.erasing_mode) == (0.1, 0.25, "pixel")
    assert (augment.scale, augment.interpolation, augment.mode) == ((0.08, 1.0), "bicubic", "batch")


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.stem)
def test_every_number_has_its_source(preset):
    lines = preset.read_text().splitlines()
    assert f"contramask finetune RUN --preset {preset.stem} " in "\n".join(lines[:3])
    for line in lines:
        if ":" in line and not line.startswith("#") and line.split("#")[0].strip()[-1] != ":":
            assert "#" in line, line


# ---- a run --------------------------------------------------------------------------------------


def test_a_run_and_what_it_leaves(command, run, tmp_path, shards, capsys, monkeypatch):
    monkeypatch.setattr(AnalysisCallback, "_draw", lambda *_: {})  # figures have tests of their own
    main([*command, "--model.ema", "0.5", "--drift", "true", "--drift_anchor", f"[same={run}]",
          "--drift_every", "8"])  # fmt: skip
    folder = tmp_path / "tuned"
    result = json.loads((folder / "result.json").read_text())
    assert (result["probe"], result["run"], result["step"]) == ("finetune", str(run), 9)
    assert (result["updates"], result["values"]["images"]) == (8, 64)
    for words in ("256 images (all training images), 1.0 epochs at batch 32", "layer decay 0.75",
                  "rand-m7-mstd0.5-inc1", "centre crop 16", "64 classes"):  # fmt: skip
        assert words in result["protocol"]
    assert "protocol" in capsys.readouterr().out
    rows = read_metrics(folder / "metrics.jsonl")
    assert len([r for r in rows if "train/loss" in r]) == 8
    last = rows[-1]
    assert {"val/top1", "val/top5", "val/loss", "val/ema_top1", "optim/lr"} <= last.keys()
    # The drift is from the pretrained weights, and at first they are the anchor.
    first = next(r for r in rows if "cka/same/block_01" in r)
    assert (first["step"], first["cka/same/block_01"]) == (0, pytest.approx(1, abs=1e-4))
    assert last["cka/initial/block_01"] == pytest.approx(last["cka/same/block_01"], abs=1e-4)
    # The files are the weights that were scored.
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for part, prefix, name in ((folder, "classifier.", "top1"), (folder / "ema", "average.module.",
                               "ema_top1")):  # fmt: skip
        classifier, sheet = load_classifier(part)
        for key, value in classifier.state_dict().items():
            assert torch.equal(value, saved[prefix + key]), key
        assert (sheet["head"]["pool"], sheet["step"]) == ("mean", 8)
        assert len(sheet["head"]["names"]) == 64
        assert sheet["origin"]["finetuned"]["backbone"] == result["backbone"]
        fed = {k: tuple(v) if isinstance(v, list) else v for k, v in sheet["data"].items()}
        data = ImageShards(shards["val"], val=shards["val"], workers=0, images=Images(**fed))
        right = 0
        for batch in data.clean_dataloader("val"):
            batch = data.to_device(batch, "cpu")
            scores = classifier.eval()(batch["views"]["clean"][0])
            right += int((scores.argmax(1) == batch["label"]).sum())
        assert right / 64 == pytest.approx(result["values"][name], abs=1e-6)
    backbone, sheet = load_backbone(folder)  # as any other
    assert backbone.config["positions"] == "learned"
    assert sheet["data"]["mean"] == [0.5, 0.4, 0.3]


def test_told_to_stop_and_continued_it_is_straight(command, tmp_path):
    """SIGTERM in the third of eight updates; validation falls on the update it stops after."""
    command += ["--model.ema", "0.5", "--model.drop_path", "0.3", "--validate_every", "0.375"]
    straight = [*command, "--name", "straight"]
    main(straight)
    stop = "[{class_path: tests.cli.test_finetune.Terminate}]"
    try:
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--trainer.callbacks", stop])
    finally:
        inbox.restore()
    assert stopped.value.code == 128 + signal.SIGTERM
    folder = tmp_path / "tuned"
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    assert not (folder / "result.json").exists()
    main(command)
    expected, found = state_of(tmp_path / "straight"), state_of(folder)
    assert expected.keys() == found.keys()
    assert [k for k, v in expected.items() if not torch.equal(v, found[k])] == []
    shown = ("train/loss", "val/top1", "val/loss", "val/ema_loss", "optim/lr")
    rows = [
        [{k: r[k] for k in shown if k in r} for r in read_metrics(f / "metrics.jsonl")]
        for f in (tmp_path / "straight", folder)
    ]
    assert rows[0] == rows[1]
    assert [("val/top1" in r) for r in rows[0]] == [s in (3, 6, 8) for s in range(1, 9)]
    results = [(f / "result.json").read_text() for f in (tmp_path / "straight", folder)]
    assert results[0] == results[1]
    # Once more: nothing is left to do, and the result is the same.
    (folder / "result.json").unlink()
    main(command)
    assert (folder / "result.json").read_text() == results[0]


def test_few_labels(command, tmp_path):
    """One image of each class, several epochs; a result at a place of the user's choice."""
    given = [word for word in command if word not in ("--name", "tuned")]
    out = tmp_path / "somewhere" / "low.json"
    main([*given, "--per_class", "1", "--epochs", "3", "--out", str(out), "--data.batch_size", "16",
          "--trainer.accumulate_grad_batches", "2"])  # fmt: skip
    result = json.loads(out.read_text())
    assert (
        "64 images (1 images of each class (seed 0)), 3.0 epochs at batch 32" in result["protocol"]
    )
    assert result["updates"] == 6
    assert (tmp_path / "somewhere" / "low" / "checkpoints" / "last.ckpt").exists()


# ---- mistakes -----------------------------------------------------------------------------------


def test_mistakes(command, run, data, tmp_path):
    for more, words in (
        (["--images.size", "18"], r"images of 18 pixels are no whole number of patches of 4"),
        (["--epochs", "0"], r"--epochs is 0 and --validate_every 5"),
        (["--subset", "2"], r"the fraction is 2.0; it is above 0 and at most 1"),
        (["--subset", "0.1"], r"10 % of each class \(seed 0\) leave classes 0, 1, 2, 3, 4 and 59"),
        (["--preset", "mae_vit_b32"], r"no preset 'mae_vit_b32'; there are beit_vit_b16, deit_vit"),
        (["--data.batch_size", "31"], r"batch_size is 31, but mixup and cutmix pair"),
        (["--model.optim.layer_dekay", "1"], r"did you mean layer_decay"),
        (["--drift_anchor", "[nowhere]"], r"there is no nowhere"),
    ):
        with pytest.raises(UserError, match=words):
            main([*command, *more])
    with pytest.raises(UserError, match=r"a fine-tuning needs a recipe: --preset beit_vit_b16 or"):
        main([str(run), *data])
    preset = ["--preset", "vit_tiny_cifar10", "--root", str(tmp_path), "--wandb.mode", "disabled"]
    with pytest.raises(UserError, match=r"data.val names no shards"):
        main([str(run), *preset, *data[:2], "--trainer.accelerator", "cpu", "--name", "x"])
    with pytest.raises(UserError, match=r"there is no nowhere; a model is a run"):
        main(["nowhere", *preset, *data])
    assert presets() == [path.stem for path in PRESETS]


def test_a_recipe_may_name_its_preset(run, data, tmp_path):
    """As entries of `contramask evaluate` do."""
    parser, file = build_parser(), tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"preset": "mae_vit_b16", "run": str(run), "epochs": 0.0}))
    with pytest.raises(UserError, match=r"--epochs is 0"):  # its own, over those of the preset
        main(["-c", str(file), *data])
    assert parser.parse_args(["-c", str(file), *data]).preset == "mae_vit_b16"


def test_other_weights_are_another_run(command, run, tmp_path):
    """A newer export behind the same path neither goes on with the old one nor takes its number."""
    moving = tmp_path / "moving"
    export_backbone(load_backbone(run)[0], moving, net="student", step=9, data=FED)
    command = [str(moving), *command[1:], "--trainer.max_steps", "1"]
    main(command)
    before = (tmp_path / "tuned" / "result.json").read_text()
    other = tiny_vit(img_size=SIDE, positions="sincos")
    torch.nn.init.ones_(other.vit.cls_token)
    export_backbone(other, moving, net="student", step=900, data=FED)
    with pytest.raises(UserError, match=r"backbone: "):
        main(command)
    assert (tmp_path / "tuned" / "result.json").read_text() == before
    # The configuration of the run insists on the weights of then.
    with pytest.raises(UserError, match="has other weights now"):
        main(["-c", str(tmp_path / "tuned" / "config.yaml"), "--name", "again"])


def test_another_subset_is_another_run(command):
    main([*command, "--per_class", "2"])
    with pytest.raises(UserError, match=r"belongs to another configuration: per_class: 2 -> 1"):
        main([*command, "--per_class", "1"])


def test_files_that_do_not_belong_together(tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        backbone = tunable(tiny_vit(img_size=SIDE, seed=seed), size=SIDE)
        save_classifier(Classifier(backbone, 5), tmp_path / name, step=1, data=FED)
    classifier, _ = load_classifier(tmp_path / "one")
    images = randn(2, 3, SIDE, SIDE)
    assert classifier.eval()(images).shape == (2, 5)
    (tmp_path / "two" / HEAD_SHEET).write_text((tmp_path / "one" / HEAD_SHEET).read_text())
    with pytest.raises(UserError, match=r"was trained with another backbone than the one beside"):
        load_classifier(tmp_path / "two")
    (tmp_path / "two" / HEAD_SHEET).unlink()
    with pytest.raises(UserError, match=r"has no head.yaml: a classifier is what"):
        load_classifier(tmp_path / "two")
