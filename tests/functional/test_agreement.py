"""Agreement of two classifiers: scikit-learn, scipy, and answers known beforehand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import hamming
from scipy.stats import kendalltau
from sklearn.metrics import accuracy_score, f1_score

from contramask.functional.agreement import f1_counts, kendall, macro_f1, outcomes
from contramask.types import UserError
from tests.builders import randn


def draw(rows: int, classes: int, seed: int) -> torch.Tensor:
    return torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))


def test_outcomes_of_known_predictions():
    label = torch.tensor([0, 0, 0, 0, 0])
    found = outcomes(torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 2, 0, 1, 2]), label)
    assert found.same.tolist() == [True, False, False, True, False]
    assert found.both_right.tolist() == [True, False, False, False, False]
    assert found.both_wrong.tolist() == [False, False, False, True, True]
    assert found.same_wrong.tolist() == [False, False, False, True, False]
    assert found.split.tolist() == [False, True, True, False, False]


@given(st.integers(0, 1000))
def test_rates_against_scikit_learn_and_scipy(seed):
    a, b, y = (draw(37, 4, seed + i) for i in range(3))
    found = outcomes(a, b, y)
    assert found.same.float().mean().item() == pytest.approx(accuracy_score(a, b))
    assert found.split.float().mean().item() == pytest.approx(hamming(a == y, b == y))
    parts = found.both_right.int() + found.both_wrong.int() + found.split.int()
    assert parts.eq(1).all()
    assert torch.equal(found.same, found.same_wrong | found.both_right)


@given(st.integers(0, 1000), st.integers(1, 40))
def test_f1_is_that_of_scikit_learn(seed, rows):
    """Also where most classes are predicted by neither: those do not count."""
    a, b = draw(rows, 7, seed), draw(rows, 9, seed + 1)
    found = macro_f1(f1_counts(a, b, 11))
    assert found.item() == pytest.approx(f1_score(a, b, average="macro"))
    assert macro_f1(f1_counts(b, a, 11)).item() == pytest.approx(found.item())


def test_f1_counts_add_and_take_draws():
    a, b = draw(30, 5, 0), draw(30, 5, 1)
    whole = f1_counts(a, b, 6)
    assert torch.equal(f1_counts(a[:11], b[:11], 6) + f1_counts(a[11:], b[11:], 6), whole)
    images = torch.randint(30, (4, 30), generator=torch.Generator().manual_seed(2))
    drawn = macro_f1(f1_counts(a[images], b[images], 6))
    for i, rows in enumerate(images):
        assert drawn[i].item() == pytest.approx(f1_score(a[rows], b[rows], average="macro"))


def by_scipy(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """Of one image: the classes among the k best of either, by stable sorting."""
    union = set(np.argsort(-a, kind="stable")[:k]) | set(np.argsort(-b, kind="stable")[:k])
    classes = sorted(union)
    return kendalltau(a[classes], b[classes]).statistic


@pytest.mark.parametrize("k", [1, 2, 5, 12])
@pytest.mark.parametrize("elements", [2**24, 300])
@pytest.mark.filterwarnings("ignore:One or more sample arguments is too small")
def test_tau_is_that_of_scipy(k, elements):
    """With ties: scores rounded to a few values."""
    smooth, rough = randn(60, 12), (randn(60, 12, seed=1) * 1.5).round()
    for a, b in ((smooth, rough), (rough, (rough + randn(60, 12, seed=2)).round())):
        value, defined = kendall(a, b, k, elements=elements)
        expected = np.array([by_scipy(*pair, k) for pair in zip(a.numpy(), b.numpy(), strict=True)])
        assert defined.tolist() == (~np.isnan(expected)).tolist()
        np.testing.assert_allclose(value, np.nan_to_num(expected), atol=1e-12)


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_tau_of_the_same_and_the_opposite_order(seed):
    a = randn(3, 8, seed=seed)
    value, defined = kendall(a, 5 * a.exp(), 4)
    assert defined.all()
    torch.testing.assert_close(value, torch.ones(3).double())
    torch.testing.assert_close(kendall(a, -a, 8)[0], -torch.ones(3).double())


@pytest.mark.parametrize("k", [2, 5, 10])
def test_the_published_variant_is_that_of_ordered_ids(k):
    a, b = randn(25, 13), randn(25, 13, seed=1)
    value, defined = kendall(a, b, k, of="class_ids")
    lists = [np.argsort(-x.numpy(), axis=1)[:, :k] for x in (a, b)]
    expected = [kendalltau(x, y).statistic for x, y in zip(*lists, strict=True)]
    assert defined.all()
    np.testing.assert_allclose(value, expected, atol=1e-12)
    assert (value - kendall(a, b, k)[0]).abs().max() > 0.1


def test_the_published_variant_depends_on_the_numbers_of_classes():
    a, b = randn(25, 13), randn(25, 13, seed=1)
    other = torch.randperm(13, generator=torch.Generator().manual_seed(3))
    for of, same in (("scores", True), ("class_ids", False)):
        found, again = (
            kendall(*pair, 4, of=of)[0] for pair in ((a, b), (a[:, other], b[:, other]))
        )
        assert torch.allclose(found, again) is same


def test_where_there_is_no_order_there_is_no_tau():
    flat, a = torch.zeros(4, 6), randn(4, 6)
    for pair in ((flat, a), (a, flat), (flat, flat)):
        value, defined = kendall(*pair, 3)
        assert not defined.any()
        assert value.eq(0).all()
    assert not kendall(a, a, 1)[1].any()
    assert not kendall(a, a, 1, of="class_ids")[1].any()


def test_of_equal_scores_the_lower_class_is_the_better():
    """As of votes, which most classes have none of: 470, 0, 1 against 0, 1, 2."""
    a, b = torch.zeros(1, 500), torch.zeros(1, 500)
    a[0, 470] = b[0, 0] = 1
    value, _ = kendall(a, b, 3)  # of 0, 1, 2, 470
    assert value.item() == pytest.approx(kendalltau([0, 0, 0, 1], [1, 0, 0, 0]).statistic)
    value, _ = kendall(a, b, 3, of="class_ids")
    assert value.item() == pytest.approx(kendalltau([470, 0, 1], [0, 1, 2]).statistic)


def test_infinite_scores_have_an_order():
    a = torch.tensor([[1.0, -torch.inf, torch.inf, 0.0]])
    assert kendall(a, torch.tensor([[3.0, 1.0, 4.0, 2.0]]), 4)[0].item() == pytest.approx(1)


def test_no_images():
    none = torch.zeros(0).long()
    assert all(len(x) == 0 for x in outcomes(none, none, none))
    assert macro_f1(f1_counts(none, none, 4)) == 0
    value, defined = kendall(randn(0, 5), randn(0, 5), 2)
    assert len(value) == len(defined) == 0


@pytest.mark.parametrize("k", [0, 6])
def test_a_k_that_cannot_be_is_named(k):
    with pytest.raises(UserError, match=r"of 5 classes it is in 1\.\.5; set k"):
        kendall(randn(3, 5), randn(3, 5), k)
