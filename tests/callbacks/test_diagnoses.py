"""Rules on histories that show what they are for, and on healthy ones that come near."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contramask.callbacks import baselines
from contramask.callbacks.diagnoses import (
    CHANCE,
    FEATURE_STD,
    GRADIENT,
    NMI,
    RANK,
    RANKME,
    STD,
    Codes,
    Facts,
    rules,
)
from contramask.callbacks.history import KEPT, Chart, Diagnosis, Finding, History, Rule
from contramask.functional.patches import patchify
from contramask.types import Step, Tokens
from tests.builders import MASKED, RECIPES, SPEC, exact, pretraining, randn, toy_batch

FACTS = Facts(
    width=192,
    images=100,
    contrasts={"pairs": 0.8 * math.log(512)},
    words={"words": math.log(8192)},
    codes={"sort": Codes(1024, 200, "train/loss/sort")},
    targets=("ahead",),
    masked=("pixels",),
)


def history(rows: dict[str, list[float]]) -> History:
    """Numbers by key, one every 20 updates, ending together."""
    made, longest = History(), max(map(len, rows.values()))
    for i in range(longest):
        at = {k: v[i - longest + len(v)] for k, v in rows.items() if i >= longest - len(v)}
        made.note(20 * (i + 1), {k: float(v) for k, v in at.items()})
    return made


def judge(name: str, rows: dict[str, list[float]], facts: Facts = FACTS) -> Finding:
    (rule,) = [r for r in rules(facts) if r.name == name]
    finding = rule.judge(history(rows))
    # No rule but this one may see something in it, or nobody could tell what is wrong.
    others = [r.name for r in rules(facts) if r.judge(history(rows)).shown and r.name != name]
    assert others == [] or finding.shown is not True
    return finding


def codes(each: float, mean: float, loss: float, weight: float = 1.0) -> dict[str, list[float]]:
    """A steady distillation, entropies in nats."""
    rows = {
        "train/sort/target_entropy": each,
        "train/sort/code_entropy": mean,
        "train/loss/sort": loss,
        "train/weight/sort": weight,
    }
    return {key: [value] * 12 for key, value in rows.items()}


def noisy(median: float, number: int, sigma: float = 0.3, seed: int = 0) -> list[float]:
    """Log-normal, as norms of gradients are."""
    draw = random.Random(seed)
    return [median * math.exp(draw.gauss(0, sigma)) for _ in range(number)]


SICK: dict[str, tuple[str, dict[str, list[float]], str]] = {
    "a point": ("uniform_collapse", {STD: [0.9, 0.3, 0.001], RANK: [40, 20, 1.3]}, "0.001 of"),
    "a point from the start": ("uniform_collapse", {STD: [0.002, 0.001, 0.001]}, "0.001 of"),
    "few directions": (
        "dimensional_collapse",
        {STD: [0.8, 0.8, 0.7], RANK: [30, 14, 3.1]},
        "3.1 of at most 99",
    ),
    "few directions, says an analysis": (
        "dimensional_collapse",
        {STD: [0.8], RANK: [30, 30], RANKME: [40, 8.0]},
        "8.0 of at most 192",
    ),
    "ln K": ("pairs/at_chance", {"train/loss/pairs": [4.99] * 12}, "it is 4.991"),
    "worse than ln K": ("pairs/at_chance", {"train/loss/pairs": [5.4] * 12}, "is 5.4"),
    "any word": ("words/at_chance", {"train/loss/words": [9.0] * 12}, "it is 9.011"),
    "one prototype": ("sort/one_prototype", codes(0.01, 0.02, 0.05), "entropy 0.02"),
    "uniform codes": ("sort/same_codes", codes(6.92, 6.925, 6.93), "are uniform: entropy 6.92"),
    "a fixed mixture": ("sort/same_codes", codes(4.10, 4.11, 4.12), "one fixed mixture"),
    "one token": ("ahead/constant_targets", {"train/ahead/spread": [0.01] * 12}, "of 0.01"),
    "the mean": (
        "pixels/predicts_mean",
        {"train/loss/pixels": [0.995] * 12, f"{CHANCE}/pixels": [1.0, 1.0]},
        "is 0.995",
    ),
    "three spikes": (
        "gradient_spikes",
        {GRADIENT: [*noisy(1, 24), 40, *noisy(1, 5), 20, 1.1, 30, *noisy(1, 20)]},
        "3 of the last 23 gradient norms looked at are spikes, up to",
    ),
    "like attention everywhere": (
        "attention_collapse",
        {f"{NMI}{i:02d}": [0.3 - 0.028 * i] for i in range(12)},
        "information of 0.006",
    ),
}


@pytest.mark.parametrize("case", SICK)
def test_a_rule_sees_what_it_is_for(case):
    name, rows, words = SICK[case]
    finding = judge(name, rows)
    assert finding.shown is True
    assert words in finding.seen


WELL: dict[str, tuple[str, dict[str, list[float]]]] = {
    "features in many directions": ("uniform_collapse", {STD: [0.85, 0.9, 0.95]}),
    "features with a common part": ("uniform_collapse", {STD: [0.68, 0.35, 0.19, 0.08]}),
    "a rank that grows from little": ("dimensional_collapse", {STD: [0.8], RANK: [2.0, 3.0, 4.5]}),
    "a rank that falls a little": ("dimensional_collapse", {STD: [0.8], RANK: [60, 50, 31]}),
    "a contrast that begins to learn": ("pairs/at_chance", {"train/loss/pairs": [4.7] * 12}),
    "words that are learned": ("words/at_chance", {"train/loss/words": [8.0] * 12}),
    "sharp codes of many prototypes": ("sort/one_prototype", codes(0.01, 4.5, 2.0)),
    "sharp codes that differ": ("sort/same_codes", codes(0.01, 4.5, 2.0)),
    "codes as at initialisation": ("sort/same_codes", codes(5.9, 5.91, 6.9)),
    "a student that knows them all": ("sort/same_codes", codes(2.0, 4.5, 2.01)),
    "tokens that differ": ("ahead/constant_targets", {"train/ahead/spread": [0.4] * 12}),
    "pixels that are predicted": (
        "pixels/predicts_mean",
        {"train/loss/pixels": [0.8] * 12, f"{CHANCE}/pixels": [1.0]},
    ),
    "noisy gradients": ("gradient_spikes", {GRADIENT: noisy(0.7, 64, 0.6)}),
    "gradients that fall": ("gradient_spikes", {GRADIENT: [50 / i for i in range(1, 64)]}),
    "gradients that rise": ("gradient_spikes", {GRADIENT: [1.1**i for i in range(64)]}),
    "gradients of another level": (
        "gradient_spikes",
        {GRADIENT: [*noisy(0.05, 30), *noisy(4, 34)]},
    ),
    "attention of many kinds": ("attention_collapse", {f"{NMI}10": [0.2], f"{NMI}11": [0.1]}),
}


@pytest.mark.parametrize("case", WELL)
def test_a_rule_is_silent_where_all_is_well(case):
    name, rows = WELL[case]
    assert judge(name, rows).shown is False


BETWEEN: dict[str, tuple[str, dict[str, list[float]]]] = {
    "narrow from the start": ("uniform_collapse", {STD: [0.016, 0.017, 0.015]}),
    "narrow, yet a contrast tells images apart": (
        "uniform_collapse",
        {STD: [0.9, 0.01], "train/loss/pairs": [2.0] * 12},
    ),
    "narrow, yet a teacher tells images apart": (
        "uniform_collapse",
        {STD: [0.9, 0.01], **codes(0.01, 4.5, 2.0)},
    ),
    "not so narrow": ("uniform_collapse", {STD: [0.9, 0.04]}),
    "a rank that was always small": ("dimensional_collapse", {STD: [0.9] * 3, RANK: [5, 4, 3.6]}),
    "near ln K": ("pairs/at_chance", {"train/loss/pairs": [4.82] * 12}),
    "a loss of few values": ("pairs/at_chance", {"train/loss/pairs": [4.99] * 9}),
    "a term of weight 0": (
        "pairs/at_chance",
        {"train/loss/pairs": [4.99] * 12, "train/weight/pairs": [0.0] * 12},
    ),
    "codes of weight 0": ("sort/same_codes", codes(6.92, 6.925, 6.93, weight=0.0)),
    "same codes, but all of one prototype": ("sort/same_codes", codes(0.01, 0.02, 0.05)),
    "few prototypes": ("sort/one_prototype", codes(0.4, 0.5, 0.9)),
    "a point has no rank": ("dimensional_collapse", {STD: [0.9, 1e-6], RANK: [40, 1.2]}),
    "two spikes": (
        "gradient_spikes",
        {GRADIENT: [*noisy(1, 24), 40, *noisy(1, 5), 20, *noisy(1, 22)]},
    ),
    "three gradients": ("gradient_spikes", {GRADIENT: [1.0, 1.0, 100.0]}),
    "no gradient": ("gradient_spikes", {GRADIENT: [0.0] * 64}),
    "a mean of no known targets": ("pixels/predicts_mean", {"train/loss/pixels": [1.0] * 12}),
    "one block": ("attention_collapse", {f"{NMI}0": [0.0]}),
}


@pytest.mark.parametrize("case", BETWEEN)
def test_what_cannot_be_told_is_not_told(case):
    name, rows = BETWEEN[case]
    assert judge(name, rows).shown is None


@settings(max_examples=200)
@given(
    seed=st.integers(0, 10**6),
    sigma=st.floats(0.01, 1.0),
    drift=st.floats(-0.15, 0.15),
    jump=st.floats(0.01, 100),
)
def test_lognormal_gradients_that_drift_and_jump_never_alarm(seed, sigma, drift, jump):
    norms = noisy(1.0, KEPT, sigma, seed)
    norms = [n * math.exp(drift * i) * (jump if i > 33 else 1) for i, n in enumerate(norms)]
    assert judge("gradient_spikes", {GRADIENT: norms}).shown is not True


def test_every_rule_says_what_it_means_and_names_a_source():
    for rule in rules(FACTS):
        assert len(rule.means) > 40, rule.name
        assert "arXiv:" in rule.fix, rule.name
        assert not rule.means.endswith("."), rule.name
    kinds = {r.name: r.kind for r in rules(FACTS) if r.kind != "collapse"}
    assert kinds == {"gradient_spikes": "warning", "attention_collapse": "remark"}


def test_what_an_analysis_knows_is_told_beside():
    rows = {STD: [0.9, 0.001], f"{FEATURE_STD}/block_3": [0.0002]}
    assert "repr/std/block_3 0.0002" in judge("uniform_collapse", rows).seen


# ---- the bookkeeping ----------------------------------------------------------------------------


def test_a_history_forgets_but_its_greatest_value():
    made = History()
    made.note(0, {"x": 9.0})
    for step in range(1, 100):
        made.note(step, {"x": float(step % 5), "y": math.nan})
    assert made.values("x") == [float(step % 5) for step in range(100 - KEPT, 100)]
    assert (made.last("x"), made.peak("x"), made.mean("x")) == (4.0, 9.0, 2.0)
    assert (made.last("y"), made.peak("y"), made.mean("y"), made.keys("")) == (None,) * 3 + (["x"],)
    assert made.mean("x", least=11) is None


SEES: dict[str, bool | None] = {"y": True, "n": False, "-": None}


def looks(text: str, chart: Chart, *, first: int = 1, **given) -> list[Diagnosis]:
    """y: it is there, n: it is not, -: cannot be told."""
    told = []
    for step, sign in enumerate(text, first):
        rule = Rule("r", lambda _, s=sign: Finding(SEES[s], f"look {s}"), "m", "f", **given)
        told += chart.look([rule], History(), step=step, settled=True)
    return told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nnnnnn", []),
        ("yynyynyy", []),
        ("yy-yy-", []),
        ("nyyyyyy", [("begins", 4)]),
        ("yyynnynn", [("begins", 3)]),
        ("yyy--nnnn", [("begins", 3), ("ends", 8)]),
        ("yyynnnyyyy", [("begins", 3), ("ends", 6), ("begins", 9)]),
    ],
)
def test_told_once_when_it_sets_in_and_once_when_it_ends(text, told):
    found = looks(text, Chart())
    assert [(d.event, d.step) for d in found] == told
    assert all("y" in d.seen if d.event == "begins" else "n" in d.seen for d in found)


def test_one_look_is_enough_for_what_needs_no_patience():
    found = looks("nyn", Chart(), patience=1, kind="warning")
    assert [(d.event, d.step, d.since) for d in found] == [("begins", 2, 2), ("ends", 3, 2)]
    assert found[0].text == "update 2: r: look y. What it means: m. What helps: f"
    assert found[1].text == "update 3: r, since update 2, ends: look n"


def test_in_the_warm_up_only_early_rules_are_judged():
    for early in (False, True):
        chart = Chart()
        rule = Rule("r", lambda _: Finding(True, "seen"), "m", "f", patience=1, early=early)
        assert len(chart.look([rule], History(), step=1, settled=False)) == early
        assert chart.judged == ({"r": 1.0} if early else {})
        assert len(chart.look([rule], History(), step=2, settled=True)) == (not early)


@given(text=st.text("yn-", min_size=1, max_size=30), cut=st.integers(0, 30))
def test_a_chart_that_was_saved_goes_on_alike(text, cut):
    cut = min(cut, len(text))
    straight, first, second = Chart(), Chart(), Chart()
    whole = looks(text, straight)
    told = looks(text[:cut], first)
    second.load_state_dict(first.state_dict())
    assert told + looks(text[cut:], second, first=cut + 1) == whole
    assert straight.state_dict() == second.state_dict() or cut == len(text)


def test_a_history_that_was_saved_is_the_same():
    made, again = history({STD: [0.5, 0.2], "x": [1.0] * 70}), History()
    again.load_state_dict(made.state_dict())
    assert again.state_dict() == made.state_dict()
    assert (again.values("x"), again.peak(STD)) == (made.values("x"), 0.5)


# ---- what is held against -----------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["moco", "simclr", "cmae"])
def test_equal_similarities_have_the_loss_that_is_expected(recipe):
    """Objectives whose heads give every image the same: all similarities are 1."""
    module = pretraining(recipe)
    term = module.terms["contrast"]
    same = torch.tensor([1.0, *[0.0] * 7])
    for name in ("head", "predictor", "teacher"):
        if name in dict(term.named_children()):
            setattr(term, name, Constant(same))
    batch = toy_batch(0, 5)
    module.train()
    step = Step(0, 0.0)
    loss = term(module.encode(batch, step), batch, step).value
    assert loss.item() == pytest.approx(baselines.equal_scores(term, 5), rel=1e-6)


class Constant(torch.nn.Module):
    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value.expand(len(x), -1) + 0 * x.sum()


@pytest.mark.parametrize("kind", ["mae", "simmim", "maskfeat"])
def test_no_constant_is_better_than_the_one_that_is_measured(kind):
    module = pretraining(kind)
    batch = toy_batch(0, 7)
    (found,) = baselines.constant_losses(module, batch, 7).values()
    term = module.terms["masked"]
    image = batch["views"]["mild"][0]
    if kind == "simmim":
        rows = patchify(image, SPEC.patch).flatten(0, 1)
    else:
        rows = term.target(image).flatten(0, 1)

    def loss(constant: torch.Tensor) -> float:
        gap = rows - constant
        return (gap.abs() if kind == "simmim" else gap.square()).mean().item()

    best = rows.median(0).values if kind == "simmim" else rows.mean(0)
    assert found.item() == pytest.approx(loss(best), rel=1e-5)
    for seed in range(20):
        assert loss(best + 0.05 * randn(rows.shape[1], seed=seed)) > found.item()


def test_spread_of_known_clouds():
    sphere = baselines.spread(randn(4000, 12))
    assert sphere[STD].item() == pytest.approx(1, abs=0.01)
    assert sphere[RANK].item() == pytest.approx(12, abs=0.1)
    point = baselines.spread(torch.ones(50, 12) + 1e-5 * randn(50, 12))
    assert point[STD].item() == pytest.approx(1e-5 * math.sqrt(11 / 12), rel=0.1)
    line = baselines.spread(torch.ones(50, 12) + 0.3 * randn(50, 1) * exact(12, seed=3))
    assert line[RANK].item() < 1.5
    broken = baselines.spread(torch.full((5, 12), math.nan))
    assert all(math.isnan(value) for value in broken.values())


@pytest.mark.parametrize(("images", "width"), [(9, 14), (31, 14)])
def test_the_rank_is_that_of_the_centred_rows_themselves(images, width):
    x = randn(images, width) * torch.linspace(0.1, 2, width) + 1
    unit = x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True)
    values = np.linalg.svd(unit - unit.mean(0), compute_uv=False)
    share = values[values > 1e-9] / values.sum()
    expected = math.exp(-(share * np.log(share)).sum())
    assert baselines.spread(x)[RANK].item() == pytest.approx(expected, rel=1e-5)
    assert baselines.spread(x)[STD].item() == pytest.approx(
        unit.std(0, ddof=1).mean() * math.sqrt(width), rel=1e-12
    )


def test_the_facts_of_each_recipe():
    known = {}
    for recipe in RECIPES:
        module = pretraining(recipe)
        facts = baselines.facts(module, toy_batch(0, 9), world=2, images=6)
        assert (facts.width, facts.images) == (24, 6)
        known[recipe] = facts
    assert known["moco"].contrasts == {"contrast": pytest.approx(0.8 * math.log(18))}
    assert known["simclr"].contrasts == {"contrast": pytest.approx(2 * math.log(35))}
    assert known["cmae"].contrasts == {"contrast": pytest.approx(0.14 * math.log(18))}
    assert known["dino"].codes == {"distil": Codes(10, 18, "train/loss/distil")}
    assert known["ibot"].codes == {"distil": Codes(10, 18, "train/distil/cls")}
    assert known["beit"].words == {"masked": pytest.approx(math.log(13))}
    assert known["ijepa"].targets == ("masked",)
    assert {k for k, f in known.items() if f.masked == ("masked",)} == {
        "mae", "simmim", "maskfeat", "cmae", "hybrid", "hybrid_shared", "hybrid_layered",
    }  # fmt: skip
    assert baselines.facts(pretraining("moco"), toy_batch(0, 4), world=2, images=4).contrasts == {}


def test_features_are_of_the_tokens_that_are_trained():
    cls, patch = randn(5, 1, 24), randn(5, 20, 24, seed=1)
    mean = {
        recipe
        for recipe in RECIPES
        if torch.equal(baselines.pooled(pretraining(recipe), Tokens(cls, patch)), patch.mean(1))
    }
    assert mean == {*MASKED, "cmae"}
    without = baselines.pooled(pretraining("moco"), Tokens(cls[:, :0], patch))
    assert torch.equal(without, patch.mean(1))
    assert torch.equal(baselines.pooled(pretraining("moco"), Tokens(cls, patch)), cls[:, 0])


def test_the_largest_view_of_the_student_is_measured():
    batch = toy_batch(0, 5)
    shown = baselines.largest_view(pretraining("dino"), batch)
    assert torch.equal(shown, batch["views"]["global"][0])
    shown = baselines.largest_view(pretraining("mae"), batch)
    assert torch.equal(shown, batch["views"]["mild"][0])
