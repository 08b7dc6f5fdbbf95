"""Every recipe parses to what is written down, runs, and leaves what a run leaves."""

import math

import pytest
import yaml

from contramask.checkpoints.export import load_backbone
from contramask.cli.pretrain import build_parser, main
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


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_runs(recipe, data, tmp_path):
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
