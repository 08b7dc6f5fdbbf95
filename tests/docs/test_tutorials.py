"""The code in the tutorials is run as it stands there."""

import importlib.util
import re
import sys

import pytest
import torch
import yaml
from tests.conftest import REPO

from contramask.types import Pass, Spec, Step, Tokens

TEXT = (REPO / "docs" / "tutorials" / "adding_an_objective.md").read_text("utf-8")


def block(language: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    assert len(found) == 1
    return found[0]


@pytest.fixture
def barlow(tmp_path, monkeypatch):
    file = tmp_path / "barlow.py"
    file.write_text(block("python"))
    name = "contramask.objectives.barlow"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_the_objective_does_what_its_paper_says(barlow):
    torch.manual_seed(0)
    spec = Spec(dim=12, patch=8, grid=(4, 5), depth=2)
    term = barlow.BarlowTwins(spec, out=6, trade_off=0.1)
    prefix = torch.randn(14, 1, 12, requires_grad=True)  # 2 crops of 7 images
    feats = {Pass("global"): Tokens(prefix, torch.zeros(14, 20, 12))}
    loss = term(feats, {}, Step(0, 0.0)).value
    a, b = (term.head(x).detach().numpy() for x in prefix[:, 0].chunk(2))
    expected = 0.0
    for i in range(6):
        for j in range(6):
            c = (a[:, i] * b[:, j]).mean()
            expected += (1 - c) ** 2 if i == j else 0.1 * c**2
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert all(p.grad is not None for p in term.parameters())


def test_the_recipe_builds_it(barlow, tmp_path):
    from contramask.cli.pretrain import build_parser

    folder = REPO / "configs" / "pretrain"
    text = block("yaml").replace("../", f"{folder.parent}/")
    file = tmp_path / "barlow_cifar10.yaml"
    file.write_text(text)
    parser = build_parser()
    config = parser.parse_args(["-c", str(file), "--data.train", "unused.tar"])
    assert yaml.safe_load(text)["trainer"]["max_steps"] == config.trainer.max_steps
    objective = config.model.objectives["correlate"]
    assert objective.class_path == "contramask.objectives.barlow.BarlowTwins"
    assert objective.init_args.out == 256
