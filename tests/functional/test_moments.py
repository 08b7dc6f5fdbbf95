"""Moments: NumPy, merging in any order, means far from 0."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contramask.functional.moments import Moments
from tests.builders import randn


def close(found: Moments, expected: Moments) -> None:
    for name in ("count", "mean", "scatter"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-11
        )


def test_against_numpy():
    x = randn(3, 20, 5) * torch.arange(1, 6) + 4
    found = Moments.of(x)
    assert found.count == 20
    for i, rows in enumerate(x.double().numpy()):
        np.testing.assert_allclose(found.mean[i], rows.mean(0))
        np.testing.assert_allclose(found.covariance()[i], np.cov(rows.T, bias=True), rtol=1e-9)
        np.testing.assert_allclose(found.variance()[i], rows.var(0))
        np.testing.assert_allclose(found.second_moment()[i], rows.T @ rows / 20)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(0, 1000))
def test_parts_in_any_order_are_the_whole(sizes, seed):
    x = 3 * randn(sum(sizes), 4, seed=seed) + 2
    parts = [Moments.of(part) for part in x.split(sizes)]
    close(sum(parts, Moments.empty(4)), Moments.of(x))
    close(sum(parts[::-1], Moments.empty(4)), Moments.of(x))


def test_what_ranks_gather_can_be_merged():
    x = randn(2, 12, 3)
    ranks = [Moments.of(part) for part in x.split([5, 7], dim=1)]
    counts, means, scatters = (
        torch.stack([getattr(r, name) for r in ranks]) for name in ("count", "mean", "scatter")
    )
    merged = sum(map(Moments, counts, means, scatters), Moments.empty(2, 3))
    close(merged, Moments.of(x))


def test_a_mean_far_away_costs_no_digits():
    x = randn(1000, 3).double()
    far = sum((Moments.of(part) for part in (x + 1e8).split(90)), Moments.empty(3))
    torch.testing.assert_close(far.covariance(), Moments.of(x).covariance(), rtol=1e-6, atol=1e-7)
    y = (x + 1e8).numpy()
    naive = y.T @ y / 1000 - np.outer(y.mean(0), y.mean(0))
    assert np.abs(naive - np.cov(y.T, bias=True)).max() > 0.1  # what sums about 0 would give


@pytest.mark.parametrize("rows", [0, 1])
def test_one_row_and_none_vary_by_nothing(rows):
    found = Moments.of(randn(rows, 4))
    assert found.count == rows
    assert found.covariance().eq(0).all()
    assert found.mean.isfinite().all()
    close(found + found, Moments.of(randn(rows, 4).repeat(2, 1)))


def test_empty_has_the_shape_of_what_is_added():
    found = Moments.empty(2, 3)
    assert found.mean.shape == (2, 3)
    assert found.scatter.shape == (2, 3, 3)
    close(found, Moments.of(randn(2, 0, 3)))
