"""The Python of the tutorial on analyses runs as it stands."""

import re
from pathlib import Path

import pytest
import torch
from tests.builders import SIZE, randn, tiny_vit

from contramask.analysis import Analysis, Reading, Tap
from contramask.checkpoints.export import export_backbone

TUTORIAL = Path(__file__).resolve().parents[2] / "docs" / "tutorials" / "analysis.md"


@pytest.fixture(scope="module")
def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", TUTORIAL.read_text(), flags=re.DOTALL)


def test_five_lines(blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sheet = {"mean": [0.5] * 3, "std": [0.5] * 3, "size": 16}
    export_backbone(tiny_vit(), Path("runs/mae"), net="student", step=1, data=sheet)
    assert len([line for line in blocks[0].splitlines() if line]) == 5
    names = {"Path": Path, "images": randn(5, 3, *SIZE)}
    exec(blocks[0], names)
    assert names["found"].readings["attn/distance"].value.shape == (2,)


def test_an_analysis_of_ones_own(blocks):
    from contramask.analysis import analyse

    names = {"Analysis": Analysis, "Tap": Tap, "Reading": Reading}
    exec(blocks[1], names)
    vit = tiny_vit()
    with torch.no_grad():
        vit.vit.blocks[1].mlp.fc1.bias[:24] = -100.0
    found = analyse(vit, [randn(7, 3, *SIZE), randn(4, 3, *SIZE)], {"dead": names["DeadUnits"]()})
    dead = found.readings["mlp/dead"].value
    assert dead[0].item() < 0.05
    assert dead[1].item() == pytest.approx(24 / 96, abs=0.02)
