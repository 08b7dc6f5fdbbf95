"""Sentences follow from the numbers: they change when these do, and claim no more."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contramask.analysis.reading import Reading
from contramask.analysis.study import Study
from contramask.report.claims import extremes
from contramask.report.findings import caveats, findings
from contramask.report.words import Measured, at, differences, listed, number
from tests.report.studies import NAMES, layers, reading, study

A, B, C = NAMES


def models(*names: str, **about) -> Study:
    known = {"depth": 4, "dim": 40, "grid": [2, 3], "patch": 16, **about}
    return Study({name: dict(known) for name in names}, {})


def with_lines(name: str, values: dict[str, list[float]], half: float | None = 0.01) -> Study:
    """Each model has one reading over its blocks."""
    made = models(*values)
    for model, line in values.items():
        made.add((model,), [reading(name, {"layer": layers(len(line))}, line, half=half)])
    return made


def said(made: Study, topic: str):
    return next(f for f in findings(made) if f.topic == topic)


def distances(a: list[float], b: list[float], half: float | None = 0.01):
    return said(with_lines("attn/distance", {A: a, B: b}, half), "Attention distance")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.000"), (0.1234, "0.123"), (1.234, "1.23"), (9.999, "10.0"), (12.34, "12.3"),
        (99.96, "100"), (1234.5, "1,234"), (-2.4, "\u22122.40"), (1e-5, "1.0e\u221205"),
    ],
)  # fmt: skip
def test_numbers_have_about_three_digits(value, text):
    assert number(value) == text


def test_what_is_measured_is_written_with_its_interval():
    assert str(Measured(114.0, 112.0, 116.0, "px")) == "114 px [112, 116]"
    assert str(Measured(0.5, 0.25, 0.75, share=True)) == "50.0 % [25.0, 75.0]"
    assert str(Measured(0.5)) == "0.500"


def test_a_place_is_read_by_its_labels():
    axes = {"feature": ("cls", "mean"), "layer": layers(3)}
    gone = np.array([[False, True, False], [False, False, False]])
    table = reading("r", axes, np.arange(6.0).reshape(2, 3), half=0.5, unit="px", missing=gone)
    assert at(table, "mean", "block_01") == Measured(4.0, 3.5, 4.5, "px")
    assert [at(table, *p) for p in (("cls", "block_01"), ("cls", "none"), ("cls",))] == [None] * 3
    assert at(None, "x") is None
    single = at(Reading("r", {}, table.value[0, 0]))
    assert single is not None
    assert not single.sure


@given(*(st.floats(-100, 100) for _ in range(4)))
def test_apart_is_what_intervals_that_do_not_touch_are(a, b, c, d):
    x, y = (Measured(min(p), min(p), max(p)) for p in ((a, b), (c, d)))
    assert x.apart(y) == y.apart(x) == (max(x.low, y.low) > min(x.high, y.high))
    assert not x.apart(Measured(x.value))


def test_differences_need_intervals_that_do_not_overlap():
    one, two, three = Measured(1.0, 0.0, 2.0), Measured(5.0, 4.0, 6.0), Measured(5.5, 4.5, 6.5)
    assert differences({"a": one, "b": two}) == "The intervals do not overlap."
    assert differences({"a": two, "b": three}).endswith("overlap: no difference is shown.")
    mixed = differences({"a": one, "b": two, "c": three})
    assert mixed == "The intervals of b and c overlap; all other pairs differ."
    assert "no difference is claimed" in differences({"a": one, "b": Measured(9.0)})
    assert differences({"a": one}) == ""


def test_extremes_share_a_place_while_they_overlap():
    found = {
        "a": Measured(1.0, 0.0, 2.0),
        "b": Measured(5.0, 4.0, 6.0),
        "c": Measured(5.5, 4.5, 6.5),
    }
    assert extremes(found, "most far", "near") == "Most far are c and b, near a. "
    assert extremes({"b": found["b"], "c": found["c"]}, "x", "y") == ""
    chain = {
        "a": Measured(1.0, 0.0, 2.0),
        "b": Measured(2.0, 1.0, 3.0),
        "c": Measured(3.0, 2.5, 4.0),
    }
    assert extremes(chain, "highest", "lowest") == "Highest is c, lowest a. "


def test_the_farther_model_is_named_and_the_paper_put_as_a_condition():
    far = said(
        with_lines("attn/distance", {A: [9, 8, 7, 30], B: [9, 9, 9, 10]}), "Attention distance"
    )
    assert far.text.startswith(f"Farthest in the last block is {A}, nearest {B}.")
    assert f"{A} is farther than {B} in 1 of the last 2 blocks" in far.text
    assert f"if {A} was trained by a contrastive objective and {B} by masked" in far.reported
    turned = distances([9, 8, 7, 10], [9, 9, 9, 30])
    assert turned.text.startswith(f"Farthest in the last block is {B}, nearest {A}.")


def test_even_attention_is_the_mean_distance_of_all_patches():
    """2 x 3 patches of 16 pixels, over all 36 pairs with each itself among them."""
    points = [(y, x) for y in range(2) for x in range(3)]
    even = 16 * np.mean([math.dist(p, q) for p in points for q in points])
    far = said(with_lines("attn/distance", {A: [9.0, 8.0]}), "Attention distance")
    assert f"would have {number(even)} px" in far.numbers


def test_overlapping_intervals_show_nothing():
    far = distances([1, 10], [1, 12], half=2)
    assert "no difference is shown" in far.text
    assert "These models show no such difference." in far.reported
    bare = said(
        with_lines("attn/distance", {A: [1, 10], B: [1, 99]}, half=None), "Attention distance"
    )
    assert "No intervals were taken, so no difference is claimed." in bare.text
    assert "Farthest" not in bare.text


def test_collapse_is_an_nmi_near_zero():
    down = said(with_lines("attn/nmi", {A: [0.3, 0.02], B: [0.3, 0.4]}), "Collapse of attention")
    assert f"{A}: under 0.05, so its queries attend nearly alike." in down.text
    up = said(with_lines("attn/nmi", {A: [0.01, 0.2], B: [0.3, 0.4]}), "Collapse of attention")
    assert "None is under 0.05" in up.text


def test_frequencies_are_counted_over_the_layers_that_both_have():
    made = with_lines("fourier/high", {A: [-1, -1, -1, -1.0], B: [-2, -1, -0.5, -3.0, -3.0]})
    counted = f"layers that both have, {A} keeps more of high frequencies than {B} in 2, less in 1"
    assert f"Of 4 {counted}." in said(made, "Frequencies").text


@pytest.mark.parametrize(
    ("line", "half", "kind"),
    [
        ([0.1, 0.2, 0.3, 0.4], 0.01, "best in the last block of"),
        ([0.1, 0.4, 0.3, 0.2], 0.01, "falls until the last block, in"),
        ([0.1, 0.4, 0.3, 0.2], 0.15, "overlaps that of the last block, in"),
        ([0.1, 0.4, 0.3, 0.2], None, "without intervals to call it a fall, in"),
    ],
)
def test_a_fall_towards_the_end_is_one_only_for_sure(line, half, kind):
    made = models(A)
    axes = {"feature": ("mean",), "layer": (*layers(4), "final")}
    made.add((A,), [reading("class/knn", axes, [[*line, 0.9]], half=half)])
    assert f"{kind} {A}." in said(made, "Where classes peak").text


def test_class_token_against_patches():
    made = models(A, B)
    for model, mean in ((A, 0.3), (B, 0.5)):
        axes = {"feature": ("cls", "mean"), "layer": ("block_00", "final")}
        made.add((model,), [reading("class/knn", axes, [[0, 0.5], [0, mean]], half=0.02)])
    text = said(made, "Class token and patches").text
    assert f"The class token tells classes apart better in {A}." in text
    assert f"Intervals of both overlap in {B}." in text


def test_invariance_is_held_against_other_images():
    made = models(A, B, C)
    for model, value, base in ((A, 0.9, 0.1), (B, 0.99, 0.97), (C, 0.5, 0.5)):
        axes = {"feature": ("cls",), "layer": ("final",)}
        for name, number_of in (("flip", value), ("flip_shuffled", base)):
            made.add((model,), [reading(f"invariance/{name}", axes, [[number_of]], half=0.005)])
    found = said(made, "Invariance")
    assert f"{B} is highest by the cosine, but {A} by what" in found.text
    assert f"not for sure more alike than two images: {C}." in found.text
    assert number((0.9 - 0.1) / (1 - 0.1)) in found.numbers


def test_channels_are_held_against_an_even_share():
    made = with_lines("repr/variance_top10", {A: [0.9, 0.8], B: [0.9, 0.3]})  # of 40 channels
    found = said(made, "Channels of high variance")
    assert f"{A}: at least 3 times an even share" in found.text
    assert "an even share: 25.0 %" in found.numbers


def pairs(levels: dict[tuple[str, str], float], half: float | None = 0.01) -> Study:
    made = models(A, B, C)
    for pair, level in levels.items():
        axes = {"layer_a": layers(1), "layer_b": layers(1)}
        made.add(pair, [reading("cka/flat/raw", axes, [[level]])])
        made.add(pair, [reading("cka/flat/raw/same_depth_mean", {}, level, half=half)])
    return made


def test_the_nearest_pair_is_named_and_no_model_with_itself():
    found = said(pairs({(A, A): 1.0, (A, B): 0.46, (A, C): 0.73, (B, C): 0.42}), "Similarity")
    assert found.text.startswith(f"Nearest is {A} \u2013 {C}, farthest {B} \u2013 {C}.")
    assert f"{A} \u2013 {A}" not in found.numbers
    close = said(pairs({(A, B): 0.46, (A, C): 0.47}), "Similarity")
    assert close.text == "The intervals overlap: no difference is shown."


@pytest.mark.parametrize(("norm1", "less"), [(0.1, "less"), (0.9, "not less")])
def test_norm1_and_qkv_are_compared_with_norm2_and_fc1(norm1, less):
    made = pairs({(A, B): 0.5})
    axes = {"sublayer": ("norm1", "attn.qkv", "norm2", "mlp.fc1"), "layer": layers(2)}
    table = np.repeat([[norm1], [norm1], [0.6], [0.5]], 2, axis=1)
    made.add((A, B), [reading("cka/flat/raw/same_depth", axes, table)])
    found = said(made, "Parts of a block")
    assert f"norm1 and qkv are {less} alike than norm2 and fc1 in {A} \u2013 {B}." in found.text
    assert f"norm1 and qkv {number(norm1)}, norm2 and fc1 0.550" in found.numbers


@pytest.mark.parametrize(
    ("after", "kind"),
    [(0.7, "raises CKA of"), (0.3, "lowers CKA of"), (0.505, "overlap those of raw ones in")],
)
def test_standardising_changes_what_its_intervals_say(after, kind):
    made = pairs({(A, B): 0.5})
    made.add((A, B), [reading("cka/flat/standardised/same_depth_mean", {}, after, half=0.01)])
    assert f"{kind} {A} \u2013 {B}." in said(made, "Standardised channels").text


def test_agreement_is_held_against_cka():
    levels = {(A, B): 0.4, (A, C): 0.7, (B, C): 0.5}
    made = pairs(levels)
    for pair, value in zip(levels, (0.2, 0.9, 0.5), strict=True):
        made.add(pair, [reading("agree/top1", {}, value, half=0.01)])
    assert "CKA orders the pairs alike." in said(made, "Agreement").text
    made.add((A, B), [reading("agree/top1", {}, 0.99, half=0.01)])
    assert "CKA orders the pairs otherwise." in said(made, "Agreement").text


def test_a_whole_study_is_told_without_the_model_that_lacks_a_reading():
    made = study()
    topics = [f.topic for f in findings(made)]
    assert len(topics) == len(set(topics)) == 14
    assert C not in said(made, "Attention distance").numbers
    assert C in said(made, "Rank").numbers
    assert "differ in depth:" in caveats(made)[-1]


def test_nothing_is_said_of_nothing():
    assert findings(models(A)) == []
    assert caveats(models(A)) == []
    assert listed(["a", "b", "c"]) == "a, b and c"
