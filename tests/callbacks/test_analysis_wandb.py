"""Every promised key is in the file of an offline W&B run, at the right steps."""

import sys

import pytest

from contramask.tracking.wandb import STEP, make_wandb
from tests.callbacks.test_analysis import LOOKS, train, watcher
from tests.tracking.readback import read


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    monkeypatch.setenv("WANDB_X_DISABLE_STATS", "true")
    yield
    sys.modules["wandb"].teardown()


def test_promised_keys_at_their_steps(tmp_path):
    logger = make_wandb(tmp_path / "run", mode="offline")
    names = ("cka", "attention", "fourier", "geometry", "classes")
    train(watcher(tmp_path / "analysis", analyses=names, figures=True), logger=logger)
    logger.finalize("success")
    sys.modules["wandb"].teardown()  # until then the file may lag behind
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    rows = read(folder).rows
    at: dict[str, list[int]] = {}
    for row in rows:
        for key in row:
            at.setdefault(key, []).append(row[STEP])
    blocks = ("block_00", "block_01")
    for key in [
        *(f"attn/{n}/{b}" for n in ("distance", "nmi", "entropy", "diversity") for b in blocks),
        *(f"fourier/high/{b}" for b in ("embedding", *blocks)),
        *(f"repr/effective_rank/{f}/{b}" for f in ("cls", "mean") for b in (*blocks, "final")),
        *(f"class/knn/cls/{b}" for b in (*blocks, "final")),
        *("repr/rankme", "repr/std/cls/final", "analysis/seconds", "analysis/share"),
        "analysis/depth/path",
    ]:
        assert at[key] == LOOKS, key
    for key in [f"cka/{n}/{b}" for n in ("initial", "previous") for b in blocks]:
        assert at[key] == LOOKS[1:], key  # there is nothing before the start
    assert at["cka/map/path"] == LOOKS[1:]
    sent = {row["cka/map/path"] for row in rows if "cka/map/path" in row}
    assert all((folder / "files" / path).stat().st_size > 5000 for path in sent)
