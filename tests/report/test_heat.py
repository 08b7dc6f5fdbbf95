"""Heat maps show each value in its colour and its place, and nothing where there is none."""

import base64
import io
import re

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from contramask.report.heat import block_ticks, cka_maps, outputs_only, same_depth_maps, with_mean
from contramask.report.scatter import attention_pictures, tokens
from contramask.report.style import COLOURS, FAINT
from tests.report.studies import NAMES, SUBLAYERS, layers, reading, study
from tests.report.test_depth import count, words

OWN = {name: name for name in NAMES}


def inner(depth: int) -> tuple[str, ...]:
    return ("embedding", *(x for b in layers(depth) for x in (f"{b}.norm1", f"{b}.mlp.fc1", b)))


def squares(path) -> np.ndarray:
    """The picture of the first map in an SVG, a pixel a value."""
    found = re.search(r"base64,\s*([^\"]+)\"", path.with_suffix(".svg").read_text())
    assert found
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(found[1]))).convert("RGB"))


def test_every_value_is_a_square_of_its_colour(tmp_path):
    """First layers at the bottom left; colours from 0 to 1; grey where there is no value."""
    value = np.linspace(0, 1, 12).reshape(3, 4)
    gone = np.zeros((3, 4), dtype=bool)
    gone[1, 2] = True
    axes = {"layer_a": layers(3), "layer_b": layers(4)}
    table = reading("cka/flat/raw", axes, value, missing=gone)
    path = cka_maps({(NAMES[0], NAMES[1]): table}, tmp_path / "c.png", OWN)
    viridis = mpl.colormaps["viridis"].resampled(64)
    wanted = (255 * viridis(value)[..., :3]).round()
    wanted[1, 2] = [int(FAINT[i : i + 2], 16) for i in (1, 3, 5)]
    assert np.abs(squares(path) - wanted).max() <= 1
    drawn = np.asarray(Image.open(path).convert("RGB")).astype(int)
    dark, bright = (np.argwhere((drawn == viridis(x, bytes=True)[:3]).all(-1)) for x in (0.0, 1.0))
    half = drawn.shape[1] // 2  # without the colour bar
    (dark_y, dark_x), (bright_y, bright_x) = (
        at[at[:, 1] < 0.85 * drawn.shape[1]].mean(0) for at in (dark, bright)
    )
    assert dark_y > bright_y
    assert dark_x < half < bright_x


def test_values_outside_are_drawn_as_the_ends(tmp_path):
    table = reading("c", {"layer_a": layers(1), "layer_b": layers(2)}, [[-0.2, 1.3]])
    shown = squares(cka_maps({(NAMES[0], NAMES[0]): table}, tmp_path / "c.png", OWN))
    ends = [(255 * np.array(mpl.colormaps["viridis"](x)[:3])).round().tolist() for x in (0.0, 1.0)]
    assert np.abs(shown[0] - np.array(ends)).max() <= 1


def test_maps_of_models_of_different_depth_have_their_own_ticks(tmp_path):
    table = reading("c", {"layer_a": inner(5), "layer_b": inner(2)}, np.full((16, 7), 0.5))
    path = cka_maps({(NAMES[0], NAMES[2]): table}, tmp_path / "c.png", OWN, heading="CKA maps")
    said = words(path)
    assert {f"{NAMES[0]}, block", f"{NAMES[2]}, block", "CKA maps", "CKA"} <= set(said)
    assert [said.count(x) for x in ("0", "1", "4", "emb")] == [2, 2, 1, 1]


def test_ticks_are_at_the_first_layer_of_a_block():
    assert block_ticks(inner(2)) == {0.0: "emb", 1.0: "0", 4.0: "1"}
    ticks = block_ticks(inner(12))
    assert "emb" not in ticks.values()
    assert list(ticks.items())[:3] == [(1.0, "0"), (7.0, "2"), (13.0, "4")]


def test_outputs_only_are_the_rows_of_whole_blocks():
    table = reading("c", {"layer_a": inner(2), "layer_b": inner(3)}, np.arange(70.0).reshape(7, 10))
    small = outputs_only(table)
    assert small.axes == {
        "layer_a": ("embedding", *layers(2)),
        "layer_b": ("embedding", *layers(3)),
    }
    assert small.value.tolist() == table.value[[0, 3, 6]][:, [0, 3, 6, 9]].tolist()


def test_the_mean_over_blocks_leaves_out_what_is_missing():
    gone = np.array([[False, True, False], [True, True, True]])
    axes = {"sublayer": ("norm1", "attn.qkv"), "layer": layers(3)}
    table = with_mean(reading("s", axes, [[0.2, 0.9, 0.4], [0.1, 0.1, 0.1]], missing=gone))
    assert table.axes["layer"] == (*layers(3), "mean")
    assert float(table.value[0, 3]) == pytest.approx(0.3)
    assert table.missing[:, 3].tolist() == [False, True]


def test_numbers_of_the_same_depth_are_written_in_their_cells(tmp_path):
    axes = {"sublayer": SUBLAYERS[:3], "layer": layers(2)}
    gone = np.array([[False, False], [False, True], [False, False]])
    table = reading("s", axes, [[0.12, 0.34], [0.56, 0.78], [1.0, 0.9999]], missing=gone)
    path = same_depth_maps({"A & B, raw": table}, tmp_path / "s.png", heading="Same depth")
    said = words(path)
    assert {"A & B, raw", "Same depth", "block", "mean", *SUBLAYERS[:3]} <= set(said)
    assert {".12", ".34", ".56", ".23"} <= set(said)  # .23: the mean of the first row
    assert ".78" not in said
    assert said.count("1.00") == 3  # 1.0, 0.9999 and their mean


def test_tokens_are_in_the_colours_of_their_classes(tmp_path):
    square = np.array([[0, 0, 7], [1, 0, 7], [0, 1, 2], [1, 1, 2]], dtype=float)
    points = {name: {"final": np.repeat(square, 40, 0)} for name in NAMES}
    path = tokens(points, tmp_path / "t.png", heading="Tokens")
    assert {"Tokens", *NAMES, "the final norm"} <= set(words(path))
    assert [count(path, c) > 10 for c in COLOURS[:3]] == [True, True, False]
    deep = {"a": dict.fromkeys(layers(7), square), "b": {"final": square}}
    said = words(tokens(deep, tmp_path / "u.png"))
    assert [x for x in said if x.startswith("block")] == [f"block {i}" for i in (0, 2, 4, 6)]


def test_pictures_are_a_row_of_images_and_one_for_each_map(tmp_path):
    made = study(side=96)
    pictures = {who[0]: known for who, known in made.pictures.items()}
    shown = np.asarray(Image.open(attention_pictures(pictures, tmp_path / "p.png")).convert("RGB"))
    for picture in (
        pictures[NAMES[0]]["image_1"],
        pictures[NAMES[1]]["image_2/attention_block_04"],
    ):
        windows = (shown[:, :, 0] == picture[0, 0, 0]).nonzero()
        assert any(
            np.array_equal(shown[y : y + 96, x : x + 96], picture)
            for y, x in zip(*windows, strict=True)
        )
    assert shown.shape[0] == 6 + 3 * 100 + 2
