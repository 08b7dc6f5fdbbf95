"""CKA: closed forms, an independent float64 loop, and that HSIC is unbiased."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from contramask.functional.cka import cka, gram, hsic
from tests.builders import randn


def hsic_by_loop(x: np.ndarray, y: np.ndarray) -> float:
    """Song et al.'s estimator, with sums over distinct images written out."""
    k, l, n = x @ x.T, y @ y.T, len(x)
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l, 0)
    pair = trio = 0.0
    for i in range(n):
        for j in range(n):
            pair += k[i, j] * l[i, j]
            for q in range(n):
                trio += k[i, j] * l[j, q]
    four = k.sum() * l.sum()
    return (pair + four / ((n - 1) * (n - 2)) - 2 * trio / (n - 2)) / (n * (n - 3))


def aligned(x: list[torch.Tensor], y: list[torch.Tensor]) -> torch.Tensor:
    k, l = (torch.stack([gram(f) for f in z]) for z in (x, y))
    value, degenerate = cka(hsic(k, l), hsic(k, k).diagonal(), hsic(l, l).diagonal())
    assert not degenerate.any()
    return value


def test_hsic_against_a_loop():
    x, y = [randn(7, 5), randn(7, 2, 3)], [randn(7, 4), randn(7, 9) + 3, randn(7, 1)]
    found = hsic(torch.stack([gram(f) for f in x]), torch.stack([gram(f) for f in y]))
    for i, a in enumerate(x):
        for j, b in enumerate(y):
            expected = hsic_by_loop(a.flatten(1).double().numpy(), b.double().numpy())
            np.testing.assert_allclose(found[i, j].item(), expected, rtol=1e-9, atol=1e-12)


def test_hsic_is_unbiased():
    """Of independent features its mean is 0 within four standard errors, unlike the biased one."""
    x, y = randn(4000, 8, 3, seed=1), randn(4000, 8, 5, seed=2)
    found = torch.stack(
        [hsic(gram(a)[None], gram(b)[None])[0, 0] for a, b in zip(x, y, strict=True)]
    )
    error = found.std() / len(found) ** 0.5
    assert found.mean().abs() < 4 * error
    biased = torch.stack([(gram(a) * gram(b)).sum() / 7**2 for a, b in zip(x, y, strict=True)])
    assert biased.mean() > 4 * biased.std() / len(found) ** 0.5


@given(st.integers(0, 1000), st.floats(0.01, 100))
def test_alignment_of_the_same(seed, scale):
    x = randn(9, 6, seed=seed)
    rotation = torch.linalg.qr(randn(6, 6, seed=seed + 1).double()).Q.float()
    found = aligned([x], [x, scale * x @ rotation, x + 5])
    torch.testing.assert_close(found, torch.ones_like(found), rtol=0, atol=1e-4)


def test_layers_that_tell_nothing_are_marked_and_not_nan():
    x = torch.stack([gram(f) for f in (randn(6, 4), torch.ones(6, 4), torch.zeros(6, 2))])
    value, degenerate = cka(hsic(x, x), hsic(x, x).diagonal(), hsic(x, x).diagonal())
    assert value.isfinite().all()
    assert degenerate.tolist() == [[False, True, True], [True] * 3, [True] * 3]
    assert value[degenerate].eq(0).all()
