"""Figures show what they are given, are alike twice, and leave no setting behind."""

import math

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image

from contramask.report.figures import _running_mean, bars, curves, image_grid
from contramask.report.style import COLOURS, MUTED
from contramask.types import UserError

ROWS = {
    "one": [{"step": i, "train/loss": 3 / (i + 1)} for i in range(5)],
    "two": [{"step": 1000, "val/knn20_top1": 0.25, "train/loss": math.inf}],
}
TABLE = {"random init": {"shape": 12.0, "texture": 20.0}, "MAE": {"shape": 40.0}}


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def count(path, colour: str) -> int:
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((pixels(path) == wanted).all(-1).sum())


@pytest.mark.parametrize("suffix", ["png", "svg", "jpg"])
def test_the_same_bytes_twice(tmp_path, suffix):
    for draw in (
        lambda path: curves(ROWS, ["train/loss", "val/knn20_top1", "none"], path, heading="a"),
        lambda path: bars(TABLE, path, chance=12.5, spread={"MAE": {"shape": 2.0}}),
        lambda path: image_grid({"a": torch.rand(2, 3, 4, 5)}, path) if suffix == "jpg" else None,
    ):
        torch.manual_seed(0)
        first = draw(tmp_path / f"first.{suffix}")
        torch.manual_seed(0)
        second = draw(tmp_path / f"second.{suffix}")
        if first is not None:
            assert first.read_bytes() == second.read_bytes()
            assert first.stat().st_size > 500


def test_curves_name_runs_and_keys_in_text(tmp_path):
    text = curves(ROWS, None, tmp_path / "c.svg", heading="Two runs").read_text()
    words = ("one", "two", "train/loss", "val/knn20_top1", "step", "Two runs", "1 k")
    assert [word for word in words if f">{word}<" not in text] == []


def test_usual_keys_are_the_loss_its_terms_and_what_probes_found(tmp_path):
    row = {"step": 1, "time": 2.0, "train/loss": 1.0, "val/x": 1.0, "optim/lr": 1.0}
    alone = curves({"r": [{**row, "train/loss/a": 1.0}]}, None, tmp_path / "1.svg").read_text()
    two = {**row, "train/loss/a": 1.0, "train/loss/b": 1.0}
    both = curves({"r": [two]}, None, tmp_path / "2.svg").read_text()
    shown = [[k for k in two if f">{k}<" in text and k != "step"] for text in (alone, both)]
    assert shown == [
        ["train/loss", "val/x"],
        ["train/loss", "val/x", "train/loss/a", "train/loss/b"],
    ]


def test_curves_can_write_both_kinds(tmp_path):
    path = curves(ROWS, ["train/loss"], tmp_path / "new" / "c.png", svg=True)
    assert sorted(p.name for p in path.parent.iterdir()) == ["c.png", "c.svg"]


def test_each_run_has_its_colour(tmp_path):
    runs = {str(i): [{"step": s, "k": float(i)} for s in (0, 5)] for i in range(3)}
    path = curves(runs, ["k"], tmp_path / "c.png")
    assert [count(path, c) > 50 for c in COLOURS[:4]] == [True, True, True, False]


def test_unknown_keys_are_refused_with_those_there_are(tmp_path):
    with pytest.raises(UserError, match="keys loss; there are step, train/loss, val/knn20_top1;"):
        curves(ROWS, ["loss"], tmp_path / "c.png")


def test_a_running_mean_is_centred_and_keeps_lines_straight():
    line = np.arange(11, dtype=float)
    assert np.allclose(_running_mean(line, 4), line)
    peak = np.zeros(11)
    peak[5] = 5
    assert _running_mean(peak, 5).tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0]


def test_numbers_that_are_none_are_gaps(tmp_path):
    values = [1.0] * 20 + [math.inf, -math.inf, math.nan] + [2.0] * 20
    rows = [{"step": i, "k": value} for i, value in enumerate(values)]
    path = curves({"r": rows}, ["k"], tmp_path / "c.png", smooth=3)
    assert count(path, COLOURS[0]) > 50


def test_bars_are_as_high_as_their_values(tmp_path):
    table = {"low": {"a": 10.0}, "high": {"a": 30.0}, "none": {"b": math.nan}}
    path = bars(table, tmp_path / "b.png", muted=["low"])
    grey, blue = count(path, MUTED), count(path, COLOURS[0])
    legend_patch = 400
    assert blue > 2 * (grey - legend_patch) > 0


def test_an_empty_table_and_no_pictures_are_refused(tmp_path):
    with pytest.raises(UserError, match="table of bars is empty"):
        bars({"a": {}}, tmp_path / "b.png")
    with pytest.raises(UserError, match="no pictures"):
        image_grid({"a": torch.rand(0, 3, 4, 5)}, tmp_path / "g.png")


def test_a_grid_shows_every_pixel_as_it_is(tmp_path):
    small, large = torch.rand(2, 3, 4, 5), torch.rand(3, 3, 120, 150)
    shown = pixels(
        image_grid({"small": small, "large": large}, tmp_path / "g.png", labels=["x"], heading="h")
    )
    for stack, times in ((small, 22), (large, 1)):  # 22 x 4 pixels are about 0.9 inches of 100
        wanted = (stack * 255).round().byte().permute(0, 2, 3, 1).numpy()
        for picture in wanted.repeat(times, 1).repeat(times, 2):
            windows = np.lib.stride_tricks.sliding_window_view(shown[:, :, 0], picture.shape[:2])
            corners = (windows[:, :, 0, 0] == picture[0, 0, 0]).nonzero()
            assert any(
                np.array_equal(shown[y : y + len(picture), x : x + picture.shape[1]], picture)
                for y, x in zip(*corners, strict=True)
            )


def test_values_outside_are_clipped(tmp_path):
    stack = torch.stack([torch.full((3, 9, 7), v) for v in (-1.0, 2.0, math.nan)])
    shown = pixels(image_grid({"a": stack}, tmp_path / "g.png"))
    assert (shown == 0).all(-1).sum() >= 2 * 90 * 70


def test_the_user_own_settings_do_not_matter_and_come_back(tmp_path):
    plain = curves(ROWS, None, tmp_path / "1.png").read_bytes()
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        assert curves(ROWS, None, tmp_path / "2.png").read_bytes() == plain
        assert mpl.rcParams["font.size"] == 30
