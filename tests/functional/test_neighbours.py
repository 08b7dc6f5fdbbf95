"""The weighted nearest-neighbour vote."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from contramask.functional.neighbours import ballot, nearest, vote
from contramask.functional.search import Metric, Search, bytes_held, closest
from contramask.types import UserError
from tests.functional.held import peak

Q, N, D, C = 7, 23, 5, 4
PARITY = Path(__file__).parents[1] / "parity" / "dino_knn.pt"


def unit(rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, D, generator=generator), dim=1)


def labels(rows: int, seed: int = 2) -> torch.Tensor:
    return torch.randint(C, (rows,), generator=torch.Generator().manual_seed(seed))


def by_loops(queries, bank, labels, k: int, temperature: float) -> np.ndarray:
    """The definition, one vote at a time, in double precision."""
    votes = np.zeros((len(queries), C))
    for q, query in enumerate(queries.double().numpy()):
        cosines = [float(np.dot(query, row)) for row in bank.double().numpy()]
        for n in sorted(range(len(bank)), key=lambda n: -cosines[n])[:k]:
            votes[q, labels[n]] += math.exp(cosines[n] / temperature)
    return votes


def test_votes_are_those_of_the_definition():
    queries, bank, y = unit(Q), unit(N, 1), labels(N)
    found = vote(queries, bank, y, ks=(1, 6, 3, N), classes=C, temperature=0.3)
    assert list(found) == [1, 6, 3, N]
    for k, votes in found.items():
        assert votes.shape == (Q, C)
        np.testing.assert_allclose(votes, by_loops(queries, bank, y, k, 0.3), rtol=1e-5)


def test_predictions_are_those_of_scikit_learn():
    queries, bank, y = unit(200), unit(150, 1), labels(150)
    found = vote(queries, bank, y, ks=(3, 20, 100), classes=C)
    for k, votes in found.items():
        theirs = KNeighborsClassifier(
            n_neighbors=k,
            algorithm="brute",
            metric="cosine",
            weights=lambda distance: np.exp((1 - distance.astype(np.float64)) / 0.07),
        ).fit(bank.numpy(), y.numpy())
        p = torch.from_numpy(theirs.predict_proba(queries.numpy())).float()
        torch.testing.assert_close(votes / votes.sum(1, keepdim=True), p, rtol=1e-3, atol=1e-5)
        assert torch.equal(votes.argmax(1), p.argmax(1))


@settings(max_examples=30)
@given(elements=st.integers(1, 4 * N), k=st.integers(1, N))
def test_slices_change_nothing(elements: int, k: int):
    queries, bank, y = unit(Q), unit(N, 1), labels(N)
    whole = vote(queries, bank, y, ks=(k,), classes=C)[k]
    torch.testing.assert_close(
        vote(queries, bank, y, ks=(k,), classes=C, elements=elements)[k], whole
    )


def test_few_neighbours_are_a_prefix_of_many():
    queries, bank, y = unit(Q), unit(N, 1), labels(N)
    together = vote(queries, bank, y, ks=(2, 9), classes=C)
    assert torch.equal(together[2], vote(queries, bank, y, ks=(2,), classes=C)[2])


def test_one_neighbour_that_is_the_query_votes_for_its_label_with_exp_of_one_over_t():
    bank, y = unit(N, 1), labels(N)
    votes = vote(bank, bank, y, ks=(1,), classes=C, temperature=0.5)[1]
    assert torch.equal(votes.argmax(1), y)
    torch.testing.assert_close(votes.sum(1), torch.full((N,), math.exp(2.0)))


def test_the_nearest_decides_when_the_temperature_is_low_and_the_majority_when_it_is_high():
    bank = F.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.5], [1.0, -0.5]]), dim=1)
    query, y = torch.tensor([[1.0, 0.0]]), torch.tensor([0, 1, 1])
    assert vote(query, bank, y, ks=(3,), classes=2, temperature=1 / 80)[3].argmax() == 0
    assert vote(query, bank, y, ks=(3,), classes=2, temperature=10.0)[3].argmax() == 1


def test_no_query_gives_no_row():
    assert vote(unit(Q)[:0], unit(N), labels(N), ks=(2,), classes=C)[2].shape == (0, C)


def test_the_nearest_come_first():
    products, places = nearest(unit(Q), unit(N, 1), k=5, elements=2 * N)
    assert (products.diff(dim=1) <= 0).all()
    torch.testing.assert_close(products, (unit(Q) @ unit(N, 1).mT).gather(1, places))


METRICS: list[Metric] = ["cosine", "dot", "l2"]


@pytest.mark.parametrize("metric", METRICS)
def test_each_metric_is_that_of_its_definition(metric: Metric):
    """In float64, by loops; rows of different lengths, so that the metrics disagree."""
    queries, bank = 3 * unit(Q) + 1, unit(N, 1) * torch.linspace(0.2, 9, N)[:, None]
    q, b = queries.double().numpy(), bank.double().numpy()
    by = {
        "cosine": lambda x, y: np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y),
        "dot": np.dot,
        "l2": lambda x, y: -((x - y) ** 2).sum(),
    }
    expected = np.array([[by[metric](x, y) for y in b] for x in q])
    found = nearest(queries, bank, k=6, metric=metric)
    order = np.argsort(-expected, axis=1)[:, :6]
    np.testing.assert_array_equal(found.numbers, order)
    np.testing.assert_allclose(
        found.similarities, np.take_along_axis(expected, order, 1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_uniform_votes_are_those_of_scikit_learn(metric: Metric):
    queries, bank, y = unit(200), unit(150, 1) * torch.linspace(0.2, 3, 150)[:, None], labels(150)
    near = nearest(queries, bank, k=50, metric=metric)
    found = ballot(near.similarities, y[near.numbers], ks=(1, 7, 50), classes=C, weights="uniform")
    for k, votes in found.items():
        theirs = KNeighborsClassifier(
            n_neighbors=k,
            algorithm="brute",
            metric="cosine" if metric == "cosine" else "euclidean",
        ).fit(bank.numpy(), y.numpy())
        expected = torch.from_numpy(k * theirs.predict_proba(queries.numpy())).round()
        assert torch.equal(votes.floor().double(), expected)
        clear = expected.sort(dim=1).values[:, -2:].diff(dim=1)[:, 0] > 0
        assert clear.sum() > 100
        assert torch.equal(votes.argmax(1)[clear], expected.argmax(1)[clear])


def test_of_equal_counts_the_class_of_the_nearest_wins():
    chosen = torch.tensor([[2, 1, 1, 2], [3, 1, 2, 0], [0, 3, 3, 3]])
    votes = ballot(torch.zeros(3, 4), chosen, ks=(1, 2, 3, 4), classes=C, weights="uniform")
    assert {k: v.argmax(1).tolist() for k, v in votes.items()} == {
        1: [2, 3, 0],
        2: [2, 3, 0],
        3: [1, 3, 3],
        4: [2, 3, 3],
    }
    assert votes[4].floor().tolist() == [[0, 2, 2, 0], [1, 1, 1, 1], [1, 0, 0, 3]]


def test_counts_of_thousands_are_still_exact():
    k = 5000
    chosen = torch.arange(k)[None] % 2
    votes = ballot(torch.zeros(1, k), chosen, ks=(k, k - 1), classes=2, weights="uniform")
    assert votes[k].argmax() == 0
    assert votes[k].floor().tolist() == [[k / 2, k / 2]]
    assert votes[k - 1].floor().tolist() == [[k / 2, k / 2 - 1]]


def with_twins(rows: int, dim: int) -> torch.Tensor:
    """A bank in which every fourth row is one of two: more equals than any k here."""
    x = torch.randn(rows, dim, generator=torch.Generator().manual_seed(3)) + 2
    x[::8], x[4::8] = x[0], x[4]
    return x


@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=12, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 400), max_size=5),
    turn=st.integers(0, 5),
    k=st.integers(1, 60),
    queries=st.integers(0, 30),
)
def test_parts_of_the_bank_change_no_bit(metric: Metric, cuts, turn: int, k: int, queries: int):
    """Any parts, in any order, empty ones too, and other queries beside: ties go by the number."""
    bank, numbers = with_twins(400, 19), torch.arange(400)
    whole = nearest(bank, bank, k=k, metric=metric)
    centre = bank.mean(0, dtype=torch.float64)
    edges = [0, *sorted(cuts), 400]
    parts = [slice(*edge) for edge in itertools.pairwise(edges)]
    search = Search(bank[:queries], k=k, metric=metric, centre=centre)
    for part in parts[turn:] + parts[:turn]:
        search.add(bank[part], numbers[part])
    found = search.found()
    assert torch.equal(found.similarities, whole.similarities[:queries])
    assert torch.equal(found.numbers, whole.numbers[:queries])


@pytest.mark.parametrize("metric", METRICS)
def test_of_equally_near_rows_the_lower_number_is_first(metric: Metric):
    bank = with_twins(400, 19)
    found = nearest(bank[:1], bank, k=30, metric=metric)
    same = found.similarities[0] == found.similarities[0, 0]
    # A longer row may have a larger inner product than the twins have among themselves.
    if metric != "dot":
        assert found.numbers[0].tolist() == list(range(0, 240, 8))
        assert same.all()
    tied = found.similarities[0].diff() == 0
    assert tied.any()
    assert (found.numbers[0].diff()[tied] > 0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_the_own_row_is_left_out_and_its_twins_are_not(metric: Metric):
    bank, k = with_twins(100, 19), 99
    own = torch.arange(100)
    own[7] = -1  # not in the bank
    search = Search(bank, k=k, metric=metric, own=own, centre=bank.mean(0))
    search.add(bank[:31], torch.arange(31))
    search.add(bank[31:], torch.arange(31, 100))
    found, whole = search.found(), nearest(bank, bank, k=100, metric=metric)
    for i, numbers in enumerate(found.numbers.tolist()):
        others = [n for n in whole.numbers[i].tolist() if n != i]
        assert numbers == (whole.numbers[i].tolist()[:k] if i == 7 else others)
    assert found.similarities.isfinite().all()


def test_a_search_that_saw_too_few_rows_says_so():
    search = Search(unit(Q), k=5, metric="cosine")
    search.add(unit(N)[:2], torch.tensor([3, 9]))
    found = search.found()
    assert found.numbers[:, :2].sort(dim=1).values.tolist() == [[3, 9]] * Q
    assert found.similarities[:, 2:].eq(-torch.inf).all()
    values, numbers = closest(
        torch.tensor([[1.0, 2.0, 1.0, 3.0]]), torch.tensor([[8, 4, 2, 6]]), k=3
    )
    assert (values.tolist(), numbers.tolist()) == ([[3.0, 2.0, 1.0]], [[6, 4, 2]])


def test_distances_far_from_zero_do_not_cancel():
    queries, bank = unit(Q) + 3000, unit(N, 1) + 3000
    found = nearest(queries, bank, k=N, metric="l2")
    expected = -torch.cdist(queries.double(), bank.double()).square()
    torch.testing.assert_close(
        found.similarities.double(), expected.gather(1, found.numbers), rtol=1e-4, atol=1e-5
    )


def test_autocast_and_tf32_change_nothing():
    queries, bank = unit(Q), unit(N, 1)
    expected = nearest(queries, bank, k=5)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = nearest(queries, bank, k=5)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found.similarities, expected.similarities)


def test_what_is_held_is_counted():
    before = torch.ones(1000)

    def work() -> None:
        first = before + 1
        view = first[:10]
        del first
        second = view.clone().repeat(50)
        del view
        second.add_(1)
        torch.zeros(600)

    assert peak(work) == 4 * (1000 + 10 + 500)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("alike", [False, True])
def test_memory_is_within_its_bound_and_does_not_grow_with_the_bank(metric: Metric, alike: bool):
    """Also where all rows are equally near."""
    dim, k, queries = 48, 20, torch.randn(700, 48)
    bank = torch.ones(70_000, dim) if alike else torch.randn(70_000, dim)
    numbers = torch.arange(len(bank))

    def search(rows: int, count: int, elements: int = 2**26) -> int:
        def work() -> None:
            found = Search(queries[:count], k=k, metric=metric, centre=bank[0], elements=elements)
            found.add(bank[:rows], numbers[:rows])
            found.found()

        return peak(work)

    of_parts = 9 * len(bank)  # differences of numbers, to see that they ascend
    most = search(70_000, 30)
    assert 2**24 < most < bytes_held(30, dim, k, bank.device) + of_parts
    assert most < 1.01 * search(35_000, 30) + of_parts
    small = search(20_000, 700, 2**20)
    bound = bytes_held(700, dim, k, bank.device, elements=2**20)
    assert 0.3 * bound < small < bound + of_parts


def test_a_temperature_that_leaves_float32_is_named():
    for temperature in (0.0, 0.012, -1.0, math.nan):
        with pytest.raises(UserError, match=r"allowed are 0\.0125 and more"):
            vote(unit(Q), unit(N), labels(N), ks=(1,), classes=C, temperature=temperature)
    coldest = vote(unit(N), unit(N), labels(N), ks=(N,), classes=C, temperature=1 / 80)
    assert coldest[N].isfinite().all()


@pytest.mark.parametrize("ks", [(N + 1,), (3, N + 1), (0,), (-2, 3), ()])
def test_a_k_that_cannot_be_is_named(ks: tuple[int, ...]):
    with pytest.raises(UserError, match=r"k-NN: ks? is .*; set"):
        vote(unit(Q), unit(N), labels(N), ks=ks, classes=C)


def test_accuracies_are_those_of_the_official_evaluation():
    case = torch.load(PARITY, weights_only=True)
    queries, bank = (F.normalize(case[part], dim=1) for part in ("test", "train"))
    ks = tuple(case["results"])
    found = vote(queries, bank, case["ytr"], ks=ks, classes=10, temperature=case["T"])
    for k, (top1, top5) in case["results"].items():
        # The official code ranks classes without a vote too, in the order of their index.
        ranked = found[k].sort(dim=1, descending=True, stable=True).indices
        right = (ranked == case["yte"][:, None]).float()
        assert 100 * right[:, 0].mean().item() == pytest.approx(top1)
        assert 100 * right[:, : min(5, k)].sum(1).mean().item() == pytest.approx(top5)
