"""Leave-one-out ridge: refits by hand, scikit-learn, closed forms, what has no information."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import RidgeClassifier, RidgeClassifierCV

from contramask.functional.ridge import STRENGTHS, leave_one_out_ridge
from contramask.types import UserError
from tests.builders import randn


def classes_of(rows: int, classes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))


def penalty(x: torch.Tensor, strength: float) -> float:
    """N times the mean eigenvalue of the covariance, times the strength."""
    return strength * len(x) * np.cov(x.double().numpy().T, bias=True).trace() / x.shape[1]


def by_refits(x: torch.Tensor, y: torch.Tensor, classes: int, strength: float) -> np.ndarray:
    """Normal equations with an intercept that is not penalised, solved anew without each row."""
    design = np.concatenate([x.double().numpy(), np.ones((len(x), 1))], 1)
    weight = penalty(x, strength) * np.diag([1.0] * x.shape[1] + [0.0])
    target = np.eye(classes)[y.numpy()]
    scores = []
    for i in range(len(x)):
        a, b = np.delete(design, i, 0), np.delete(target, i, 0)
        scores.append(design[i] @ np.linalg.solve(a.T @ a + weight, a.T @ b))
    return np.array(scores)


@pytest.mark.parametrize(("rows", "dim"), [(23, 5), (11, 17), (9, 9)])
@pytest.mark.parametrize("strength", [1e-3, 0.2, 30.0])
def test_scores_are_those_of_refits(rows, dim, strength):
    x, y = randn(rows, dim) * torch.linspace(0.1, 3, dim) + 7, classes_of(rows, 4)
    found = leave_one_out_ridge(x, y, 4, (strength,))
    expected = by_refits(x, y, 4, strength)
    np.testing.assert_allclose(found.scores, expected, rtol=1e-7, atol=1e-8)
    right = (expected.argmax(1) == y.numpy()).mean()
    assert found.accuracy.tolist() == [pytest.approx(right)]
    assert found.strength.item() == strength


def test_scores_are_those_of_scikit_learn():
    """Its targets are -1 and 1 where ours are 0 and 1."""
    x, y = randn(15, 6), torch.arange(15) % 3
    found = leave_one_out_ridge(x, y, 3, (0.5,)).scores
    for i in range(15):
        rest = torch.arange(15) != i
        theirs = RidgeClassifier(alpha=penalty(x, 0.5), tol=1e-12).fit(
            x[rest].double().numpy(), y[rest].numpy()
        )
        scores = theirs.decision_function(x[i : i + 1].double().numpy())[0]
        np.testing.assert_allclose(2 * found[i].numpy() - 1, scores, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("rows", "dim"), [(40, 7), (13, 29)])
def test_errors_are_those_of_scikit_learns_own_shortcut(rows, dim):
    x, y = randn(rows, dim), torch.arange(rows) % 3
    alphas = [penalty(x, s) for s in STRENGTHS]
    theirs = RidgeClassifierCV(alphas=alphas, store_cv_results=True).fit(
        x.double().numpy(), y.numpy()
    )
    for i, strength in enumerate(STRENGTHS):
        found = leave_one_out_ridge(x, y, 3, (strength,)).scores
        target = torch.nn.functional.one_hot(y, 3)
        errors = (2 * (found - target)).square().numpy()
        np.testing.assert_allclose(errors, theirs.cv_results_[:, :, i], rtol=1e-6, atol=1e-9)


def test_the_strength_is_chosen_by_accuracy_for_each_layer():
    y = classes_of(60, 3, seed=5)
    signal = torch.nn.functional.one_hot(y, 3).float()
    layers = torch.stack(
        [torch.cat([scale * signal, randn(60, 38, seed=i)], 1) for i, scale in enumerate((0, 1, 4))]
    )
    strengths = (1e-4, 0.1, 5.0)
    together = leave_one_out_ridge(layers, y, 3, strengths)
    assert together.accuracy.shape == (3, 3)
    assert together.accuracy[2].max() > 0.95 > 0.6 > together.accuracy[0].max()
    for i, x in enumerate(layers):
        alone = [leave_one_out_ridge(x, y, 3, (s,)) for s in strengths]
        best = max(range(3), key=lambda s: alone[s].accuracy.item())  # the first of equals
        assert together.strength[i] == strengths[best]
        torch.testing.assert_close(together.scores[i], alone[best].scores, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(
            together.accuracy[i], torch.cat([a.accuracy for a in alone]), rtol=0, atol=0
        )


@settings(max_examples=25)
@given(st.integers(0, 1000), st.floats(1e-3, 1e3))
def test_scale_rotation_and_shift_change_nothing(seed, scale):
    x, y = randn(12, 5, seed=seed).double(), classes_of(12, 3, seed)
    rotation = torch.linalg.qr(randn(5, 5, seed=seed + 1).double()).Q
    found = leave_one_out_ridge(scale * x @ rotation + 3, y, 3, (0.1,)).scores
    expected = leave_one_out_ridge(x, y, 3, (0.1,)).scores
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_scores_of_a_row_sum_to_one():
    scores = leave_one_out_ridge(randn(14, 6), classes_of(14, 4), 4).scores
    torch.testing.assert_close(scores.sum(1), torch.ones(14).double())


@pytest.mark.parametrize("dim", [3, 21])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_constant_features_leave_the_shares_of_the_other_rows(value, dim):
    y = torch.tensor([0, 1, 1, 2, 1, 0, 1])
    found = leave_one_out_ridge(torch.full((7, dim), value), y, 4)
    expected = [[(np.delete(y.numpy(), i) == c).mean() for c in range(4)] for i in range(7)]
    np.testing.assert_allclose(found.scores, expected, atol=1e-12)
    assert found.accuracy.eq(4 / 7).all()


@pytest.mark.parametrize("rows", [10, 41, 100])
def test_rounding_of_the_mean_is_no_feature(rows):
    """The mean of equal numbers may be off by a digit, which a relative penalty would see."""
    y = torch.arange(rows) % 3
    x = (torch.arange(1, 30).double() / 7).expand(rows, 29)
    assert not torch.equal(x.mean(0), x[0])
    found = leave_one_out_ridge(x, y, 3, (1e-4,)).scores
    expected = [[(np.delete(y.numpy(), i) == c).mean() for c in range(3)] for i in range(rows)]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_without_information_classes_of_equal_size_are_never_right():
    found = leave_one_out_ridge(torch.ones(8, 3), torch.arange(8) % 2, 2)
    assert found.accuracy.eq(0).all()


def test_a_constant_channel_only_counts_as_a_dimension():
    x, y = randn(10, 4), classes_of(10, 3)
    with_it = torch.cat([x, torch.full((10, 1), 0.1)], 1)
    found = leave_one_out_ridge(with_it, y, 3, (0.5,)).scores
    torch.testing.assert_close(found, leave_one_out_ridge(x, y, 3, (0.4,)).scores)


def test_one_class_one_row_and_none():
    one = leave_one_out_ridge(randn(6, 3), torch.full((6,), 1), 2)
    torch.testing.assert_close(one.scores, torch.tensor([[0.0, 1.0]]).double().expand(6, 2))
    assert one.accuracy.eq(1).all()
    assert leave_one_out_ridge(randn(1, 3), torch.tensor([1]), 2).scores.tolist() == [[0, 0]]
    none = leave_one_out_ridge(randn(2, 0, 3), torch.zeros(0).long(), 4)
    assert none.scores.shape == (2, 0, 4)
    assert none.accuracy.eq(0).all()
    assert none.accuracy.shape == (2, len(STRENGTHS))


@pytest.mark.parametrize("strengths", [(), (0.0,), (1.0, -1.0)])
def test_a_strength_that_cannot_be_is_named(strengths):
    with pytest.raises(UserError, match="above 0; set strengths"):
        leave_one_out_ridge(randn(4, 2), torch.arange(4), 4, strengths)


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_that_cannot_be_is_named(label):
    with pytest.raises(UserError, match=r"allowed are 0\.\.3; leave out"):
        leave_one_out_ridge(randn(3, 2), torch.tensor([0, label, 2]), 4)
