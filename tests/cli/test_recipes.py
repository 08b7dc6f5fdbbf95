"""Every recipe parses to what is written down, runs, and leaves what a run leaves."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from contramask.checkpoints.export import load_backbone
from contramask.cli.pretrain import build_parser, main
from contramask.models.tokenizers.files import save_tokenizer
from contramask.models.tokenizers.patches import PatchTokenizer
from contramask.tracking.jsonl import read_metrics
from tests.conftest import REPO

CONFIGS = REPO / "configs"
RECIPES = sorted((CONFIGS / "pretrain").glob("*.yaml"))
GOLDEN = REPO / "tests" / "golden" / "configs"


def short(text: dict) -> dict:
    """The part of a resolved configuration that is the recipe."""
    return {"model": text["model"], "data": text["data"], "max_steps": text["trainer"]["max_steps"]}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_resolved(recipe):
    parser = build_parser()
    config = parser.parse_args(["-c", str(recipe), "--data.train", "shards/train.tar"])
    resolved = short(parser.plain(config))
    golden = GOLDEN / recipe.name
    if not golden.exists():
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(yaml.safe_dump(resolved, sort_keys=False))
        pytest.fail(f"no {golden.name} yet: written now; read it and commit it")
    assert resolved == yaml.safe_load(golden.read_text()), (
        f"what {recipe.name} resolves to has changed; if it is meant, delete "
        f"tests/golden/configs/{recipe.name}, run this test, and say why in CHANGELOG.md"
    )


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_header(recipe):
    lines = recipe.read_text().splitlines()
    header = "\n".join(line for line in lines if line.startswith("#"))
    assert f"contramask pretrain -c configs/pretrain/{recipe.name}" in header
    assert "Hardware:" in header
    assert "Expected" in header
    if "cifar" not in recipe.name:
        assert "arXiv:" in header


def write_tokenizers(recipe: Path, folder: Path) -> None:
    """The files of random words that a recipe expects where it is started."""
    for objective in yaml.safe_load(recipe.read_text())["model"]["objectives"].values():
        given = objective.get("init_args", {})
        if "tokenizer" in given:
            words = torch.rand(given["vocabulary"], 3 * 4**2)
            save_tokenizer(PatchTokenizer(words), folder / given["tokenizer"])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_runs(recipe, data, tmp_path, monkeypatch):
    write_tokenizers(recipe, tmp_path)
    monkeypatch.chdir(tmp_path)
    debug = ["-c", str(recipe), "-c", str(CONFIGS / "debug.yaml")]
    main([*debug, *data, "--root", str(tmp_path), "--name", "tried"])
    run = tmp_path / "tried"
    rows = read_metrics(run / "metrics.jsonl")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    assert any("val/knn5_top1" in row for row in rows)
    assert (run / "checkpoints" / "last.ckpt").exists()
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 2
    _, sheet = load_backbone(run)
    assert sheet["step"] == 2


def state_of(run: Path) -> dict[str, torch.Tensor]:
    """Weights, buffers and moments of the last checkpoint."""
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    moments = saved["optimizer_states"][0]["state"]
    found = dict(saved["state_dict"])
    return found | {f"{i}.{k}": v for i, each in moments.items() for k, v in each.items()}


# One size of each objective always, the others by hand: on the debug backbone they differ in rates.
ONE_EACH = [
    recipe if recipe.stem.endswith("_cifar10") else pytest.param(recipe, marks=pytest.mark.slow)
    for recipe in RECIPES
]


@pytest.mark.parametrize("recipe", ONE_EACH, ids=lambda p: p.stem)
def test_resumes_bitwise(recipe, data, tmp_path, monkeypatch):
    """Stopped after one of two updates and continued: as if nothing had been."""
    write_tokenizers(recipe, tmp_path)
    monkeypatch.chdir(tmp_path)
    quiet = ["--online.every", "1000", "--pictures.every", "0", "--balance.every", "0"]
    quiet += ["--analysis.every", "0", "--watchdog.every", "0"]
    command = ["-c", str(recipe), "-c", str(CONFIGS / "debug.yaml"), *data, *quiet]
    command += ["--root", str(tmp_path), "--name"]
    stop = "[{class_path: tests.builders.StopAt, init_args: {step: 1}}]"
    main([*command, "straight"])
    main([*command, "stopped", "--trainer.callbacks", stop])
    assert (
        torch.load(tmp_path / "stopped" / "checkpoints" / "last.ckpt", weights_only=True)[
            "global_step"
        ]
        == 1
    )
    main([*command, "stopped", "--resume", "true"])
    straight, stopped = (state_of(tmp_path / name) for name in ("straight", "stopped"))
    assert straight.keys() == stopped.keys()
    assert [k for k, v in straight.items() if not torch.equal(v, stopped[k])] == []
    losses = [
        [r["train/loss"] for r in read_metrics(tmp_path / name) if "train/loss" in r]
        for name in ("straight", "stopped")
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_runs_on_two_ranks(recipe, data, tmp_path):
    """Every trained parameter has a gradient on both ranks, or DDP would stop."""
    write_tokenizers(recipe, tmp_path)
    command = [sys.executable, "-m", "contramask", "pretrain", "-c", str(recipe)]
    command += ["-c", str(CONFIGS / "debug.yaml"), *data, "--root", str(tmp_path), "--name", "two"]
    command += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, timeout=300)
    rows = read_metrics(tmp_path / "two" / "metrics.jsonl")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
