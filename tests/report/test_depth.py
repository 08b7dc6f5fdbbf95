"""Curves over depth: every model in its colour at its places, gaps where there is no value."""

from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from contramask.report.depth import Panel, _thin, fans, over_depth, profiles
from contramask.report.layers import block_of, inside, last_block, places, spoken, thinned
from contramask.report.style import COLOURS
from contramask.report.words import short
from tests.report.studies import NAMES, layers, reading

COLOUR = dict(zip(NAMES, COLOURS, strict=False))


def count(path, colour: str) -> int:
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.asarray(Image.open(path).convert("RGB")) == wanted).all(-1).sum())


def words(path) -> list[str]:
    """All texts of an SVG."""
    tree = ElementTree.parse(path.with_suffix(".svg"))
    return ["".join(t.itertext()).strip() for t in tree.iter("{http://www.w3.org/2000/svg}text")]


def curve(depth: int, level: float, **extra):
    return reading("attn/nmi", {"layer": layers(depth)}, np.full(depth, level), **extra)


def test_places_are_block_numbers_with_what_is_inside_before_them():
    labels = ["embedding", "block_00.mid", "block_00", "block_01.a", "block_01.b", "block_01"]
    assert places([*labels, "final"]) == pytest.approx([-1, -0.5, 0, 1 / 3, 2 / 3, 1, 2])
    assert places(layers(3)) == [0, 1, 2]
    assert places(["final"]) == [0]


def test_labels_are_read():
    assert [block_of(x) for x in ("block_03.attn.qkv", "block_11", "final")] == [3, 11, None]
    assert [inside(x) for x in ("block_03.attn.qkv", "block_11", "embedding")] == [
        "attn.qkv",
        "",
        "",
    ]
    assert last_block(["embedding", "block_01", "block_10.mid", "block_09", "final"]) == "block_09"
    assert last_block(["final"]) is None
    assert spoken("block_03.attn.qkv") == "block 3 attn.qkv"


def test_ticks_are_thinned_evenly():
    ticks = {-1.0: "emb", **{float(i): str(i) for i in range(24)}}
    kept = thinned(ticks, 8)
    assert list(kept.values()) == ["emb", "0", "3", "6", "9", "12", "15", "18", "21"]


def test_models_have_their_colours_and_names(tmp_path):
    lines = {name: curve(5 - i, i, half=0.1) for i, name in enumerate(NAMES)}
    path = over_depth([Panel("NMI", lines)], tmp_path / "d.png", COLOUR)
    assert [count(path, c) > 50 for c in COLOURS[:4]] == [True, True, True, False]
    assert {*NAMES, "NMI", "block", "0", "4"} <= set(words(path))


def test_a_model_without_the_reading_is_not_in_the_legend(tmp_path):
    lines = {name: curve(4, 1.0) for name in NAMES[:2]}
    path = over_depth([Panel("NMI", lines)], tmp_path / "d.png", COLOUR)
    assert NAMES[2] not in words(path)
    assert count(path, COLOURS[2]) == 0


def test_a_gap_is_not_drawn_over(tmp_path):
    """With all but the ends missing no line is left, though the ends are marked."""
    gone = np.array([False, True, True, True, True, False])
    whole, gap = (
        over_depth(
            [Panel("x", {NAMES[0]: curve(6, 1.0, missing=m, half=0.0)})],
            tmp_path / f"{i}.png",
            COLOUR,
        )
        for i, m in enumerate((np.zeros(6, dtype=bool), gone))
    )
    assert 0 < count(gap, COLOURS[0]) < 0.3 * count(whole, COLOURS[0])


def test_the_band_reaches_from_low_to_high(tmp_path):
    """Twice the interval, twice the area in its pale colour; the axes are fixed by another line."""
    frame = {NAMES[1]: reading("x", {"layer": layers(2)}, [0.0, 10.0])}
    areas = []
    for half in (1.0, 2.0):
        lines = {**frame, NAMES[0]: curve(2, 5.0, half=half)}
        picture = np.asarray(
            Image.open(over_depth([Panel("x", lines)], tmp_path / "b.png", COLOUR)).convert("RGB")
        ).astype(int)
        blue = picture[..., 2] - picture[..., 0]
        areas.append(int(((blue > 25) & (blue < 60)).sum()))
    assert areas[1] == pytest.approx(2 * areas[0], rel=0.1)


def test_final_features_heads_and_a_baseline_are_drawn(tmp_path):
    axes = {"layer": (*layers(3), "final")}
    line = {NAMES[0]: reading("a", axes, [1.0, 2.0, 3.0, 4.0], half=0.2)}
    dots = {NAMES[0]: reading("a", {"layer": layers(3), "head": ("0", "1")}, np.ones((3, 2)))}
    full = Panel("x", line, baseline=line, dots=dots, percent=True)
    path = over_depth(
        [full], tmp_path / "d.png", COLOUR, baseline="other images", heading="All of it"
    )
    assert {"other images", "All of it", "3", "400%"} <= set(words(path))
    svg = path.with_suffix(".svg").read_text()
    bare = (
        over_depth([Panel("x", line)], tmp_path / "e.png", COLOUR).with_suffix(".svg").read_text()
    )
    assert svg.count("<use") > bare.count("<use") > 3


def test_names_with_dollars_and_underscores_are_shown_as_they_are(tmp_path):
    names = ["_run_$x^2$", "cost $5"]
    colours = dict(zip(names, COLOURS, strict=False))
    path = over_depth([Panel("x", {n: curve(3, 1.0) for n in names})], tmp_path / "d.png", colours)
    assert set(names) <= set(words(path))


def test_profiles_have_numbers_along_x(tmp_path):
    lines = {NAMES[0]: reading("x", {"frequency": ("0.00", "0.29", "0.57")}, [0.0, -1.0, -2.0])}
    shares = {NAMES[1]: reading("y", {"rank": ("1", "10", "100")}, [0.5, 0.1, 0.01])}
    panels = [
        Panel("Amplitude", lines, xlabel="frequency"),
        Panel("Variance", shares, xlabel="channel", log="xy"),
    ]
    path = profiles(panels, tmp_path / "p.png", COLOUR)
    assert {"Amplitude", "frequency", "Variance", "channel", "10", "100"} <= set(words(path))
    assert count(path, COLOURS[0]) > 50 < count(path, COLOURS[1])


def test_fans_have_a_panel_for_each_model_and_a_colour_for_each_layer(tmp_path):
    def spectra(depth):
        axes = {"layer": layers(depth), "index": ("0", "1", "2")}
        return reading("f", axes, np.arange(3.0 * depth).reshape(depth, 3))

    models = {NAMES[0]: spectra(4), NAMES[1]: spectra(2)}
    path = fans(models, tmp_path / "f.png", xlabel="index", ylabel="log", heading="Spectra")
    assert {*NAMES[:2], "index", "log", "Spectra"} <= set(words(path))
    assert count(path, "#440154") > 30  # the first layer is viridis' first colour


def test_long_profiles_keep_their_ends_and_few_points():
    xs = np.arange(1.0, 1001.0)
    for log in ("", "x"):
        x, y = _thin(xs, -xs, log)
        assert len(x) <= 120
        assert (x[0], x[-1]) == (1, 1000)
        assert (y == -x).all()
    assert len(_thin(xs[:7], xs[:7], "")[0]) == 7


def test_the_same_bytes_twice(tmp_path):
    def draw(name):
        lines = {NAMES[0]: curve(4, 1.0, half=0.1)}
        return over_depth([Panel("x", lines)], tmp_path / name, COLOUR)

    one, two = draw("1.png"), draw("2.png")
    assert one.read_bytes() == two.read_bytes()
    assert one.with_suffix(".svg").read_bytes() == two.with_suffix(".svg").read_bytes()


def test_short_names_are_short_and_different():
    names = ["a" * 40 + "x" + "b" * 40, "a" * 40 + "y" + "b" * 40, "short", "z" * 24]
    found = short(names)
    assert list(found) == names
    assert len(set(found.values())) == 4
    assert max(map(len, found.values())) <= 24
    assert [found[name] for name in names[2:]] == names[2:]
