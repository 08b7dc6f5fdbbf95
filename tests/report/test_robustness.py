"""The figure of accuracies under degradations."""

import numpy as np
from matplotlib.figure import Figure

from contramask.report.robustness import _panel, draw_robustness
from contramask.report.style import COLOURS
from tests.report.test_depth import count, words


def test_each_kind_has_a_panel_and_each_model_a_line(tmp_path):
    whole = {"clean": 0.6, "noise10": 0.5, "noise40": 0.2, "freq0.2": 0.58, "freq0.4": 0.4,
             "freq0.4eps2": 0.1, "blur2": 0.3, "shuffle4": 0.2, "lowpass8": 0.5}  # fmt: skip
    models = {"dino_$1": whole, "mae": {"clean": 0.4, "noise10": 0.3}}
    path = draw_robustness(models, tmp_path / "robustness.png", heading="A heading")
    said = words(path)
    assert {"Band-limited noise", "Band-limited noise, eps 2", "Gaussian noise"} < set(said)
    assert {"Gaussian blur", "Low-pass", "Shuffled patches", "A heading", "clean images"} < set(
        said
    )
    assert {"dino_$1", "mae", "\u03c0"} < set(said)
    assert "High-pass" not in said
    assert count(path, COLOURS[0]) > count(path, COLOURS[1]) > 50
    assert path.with_suffix(".svg").exists()


def test_the_drop_is_drawn_for_band_noise_and_the_accuracy_for_others():
    points, clean, colours = {0.5: 0.6, 0.25: 0.7}, {"a": 0.8}, {"a": COLOURS[0]}
    lines = {}
    for kind in ("freq", "noise", "lowpass"):
        axes = Figure().subplots()
        _panel(axes, kind, {"a": points}, clean, colours)
        lines[kind] = [np.round(axes.lines[0].get_xydata(), 6).tolist(), axes.lines[1].get_ydata()]
    assert lines["freq"] == [[[0.25, 0.1], [0.5, 0.2]], [0, 0]]
    assert lines["noise"] == [[[0, 0.8], [0.25, 0.7], [0.5, 0.6]], [0.8, 0.8]]
    assert lines["lowpass"] == [[[0.25, 0.7], [0.5, 0.6]], [0.8, 0.8]]
