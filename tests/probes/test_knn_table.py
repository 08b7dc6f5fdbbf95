"""Counting votes of several metrics and ks: the official numbers, ranks of classes, memory."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contramask.functional.cleaning import Cleaning
from contramask.probes.knn_plan import TablePlan, standard_cleanings
from contramask.probes.knn_result import finding, values_of
from contramask.probes.knn_table import BLOCK, Scores, Shard, blocks, place_of
from tests.functional.held import peak

PARITY = Path(__file__).parents[1] / "parity" / "dino_knn.pt"


def test_accuracies_are_those_of_the_official_evaluation():
    case = torch.load(PARITY, weights_only=True)
    bank = Shard(case["train"], torch.arange(len(case["ytr"])), case["ytr"])
    ks = tuple(case["results"])
    scores = Scores(
        TablePlan(ks=ks, temperature=case["T"]), Cleaning.parse("raw"), bank, ks=ks, classes=10
    )
    for part in torch.arange(len(case["yte"])).split(30):
        scores.add(case["test"][part], case["yte"][part])
    found = scores.finished()
    assert found["images"] == len(case["yte"])
    for row in found["rows"]:
        top1, top5 = case["results"][row["k"]]
        assert 100 * row["top1"] == pytest.approx(top1, abs=1e-4)
        assert row["top5"] is None or 100 * row["top5"] == pytest.approx(top5, abs=1e-4)


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), max_size=5))
def test_of_equal_scores_the_lower_class_is_first(rows: list[list[int]]):
    scores = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    labels = torch.arange(len(rows)) % 6
    ranked = scores.sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(place_of(labels, scores), (ranked == labels[:, None]).long().argmax(1))


def test_blocks_cover_all_queries_once():
    for queries in (0, 1, BLOCK, 2 * BLOCK + 3):
        covered = [i for part in blocks(queries) for i in range(queries)[part]]
        assert covered == list(range(queries))


@pytest.mark.parametrize("word", ["raw", "pca", "top5"])
def test_memory_is_within_its_bound(word: str):
    width, rows = 40, 4000
    bank = Shard(torch.randn(rows, width), torch.arange(rows), torch.arange(rows) % 11)
    plan = TablePlan(metrics=("cosine", "l2"), cleanings=(word,), ks=(1, 20))
    queries, y = torch.randn(500, width), torch.arange(500) % 11
    made: list[Scores] = []

    def work() -> None:
        made.append(Scores(plan, Cleaning.parse(word), bank, ks=plan.ks, classes=11))
        made[0].add(queries, y)

    most = peak(work)
    assert 4 * 256 * rows < most < made[0].peak_bytes


def test_the_whole_table_leaves_a_channel():
    assert standard_cleanings(21)[-2:] == ("top10", "top20")
    assert standard_cleanings(20)[-1] == "top10"
    assert standard_cleanings(2) == ("raw", "zscore", "pca", "top1")
    assert standard_cleanings(1) == ("raw", "zscore", "pca")


def row(metric: str, cleaning: str, k: int, top1: float) -> dict:
    return {"metric": metric, "cleaning": cleaning, "k": k, "top1": top1, "top5": None}


def test_the_sentence_says_what_cleaning_changes():
    table = [row("dot", "raw", 1, 0.5), row("dot", "zscore", 1, 0.3), row("dot", "top5", 1, 0.45)]
    assert finding(table) == (
        "1-NN by inner product is 50.00 % raw and 45.00 % with top5, the best cleaning "
        "(-5.00 points)."
    )
    assert finding([row("dot", "top5", 1, 0.45), row("cosine", "raw", 20, 0.45)]) is None
    assert values_of(table, 8) == {"k1_top1": 0.5, "images": 8}
