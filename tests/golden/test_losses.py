"""Has any number moved? Ten steps of each recipe against stored losses.

A commit that moves them on purpose renews the files and says why:
`CONTRAMASK_RENEW=1 pytest tests/golden/test_losses.py`, then look at the difference.
"""

import os
from pathlib import Path

import pytest
import torch

from tests.builders import RECIPES, Losses, ToyStream, fit, known, pretraining

FOLDER = Path(__file__).parent / "losses"
HINT = "if that is meant, renew with CONTRAMASK_RENEW=1 and say why in the commit"


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_losses_of_ten_steps(recipe):
    losses, path = Losses(), FOLDER / f"{recipe}.txt"
    ema = "before" if recipe == "moco" else "after"
    module = known(pretraining(recipe, drop_path=0.1, ema=ema))
    fit(module, steps=10, stream=ToyStream(6, dtype=torch.float64), callbacks=[losses])
    names = list(losses.terms[0])
    rows = [[step[name] for name in names] for step in losses.terms]
    if os.environ.get("CONTRAMASK_RENEW"):
        lines = [" ".join(names), *(" ".join(f"{x:.8g}" for x in row) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    head, *stored = path.read_text().splitlines()
    assert head.split() == names
    assert len(stored) == len(rows) == 10
    for i, (line, row) in enumerate(zip(stored, rows, strict=True)):
        expected = [float(x) for x in line.split()]
        assert row == pytest.approx(expected, rel=1e-5), f"{recipe}, step {i}: {HINT}"
