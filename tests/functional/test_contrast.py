"""Contrastive losses: closed forms and double loops in NumPy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from contramask.functional.contrast import infonce, nt_xent
from tests.builders import randn


def sphere(*shape, seed):
    return F.normalize(randn(*shape, seed=seed).double(), dim=-1)


@pytest.mark.parametrize("n", [2, 7])
def test_identical_features_cannot_be_told_apart(n):
    x = sphere(1, 5, seed=0).expand(n, -1)
    assert infonce(x, x, 0.2).item() == pytest.approx(math.log(n))
    # The image itself is no candidate: 2 n - 1 remain, in each of two directions.
    assert nt_xent(x, x, x, x, 0.1).item() == pytest.approx(2 * math.log(2 * n - 1), rel=1e-6)


def test_infonce_against_a_loop():
    q, k, t, offset = sphere(3, 5, seed=1), sphere(7, 5, seed=2), 0.3, 4
    total = 0.0
    for i in range(3):
        scores = [math.exp(float(q[i] @ k[j]) / t) for j in range(7)]
        total -= math.log(scores[i + offset] / sum(scores))
    assert infonce(q, k, t, offset).item() == pytest.approx(total / 3, rel=1e-6)


def loop(a, b, all_a, all_b, t, offset):
    """Sum over both directions of the mean over this rank's anchors."""
    total, n = 0.0, len(a)
    for x, same, other in ((a, all_a, all_b), (b, all_b, all_a)):
        for i in range(n):
            score = {("other", j): math.exp(x[i] @ other[j] / t) for j in range(len(other))}
            score |= {
                ("same", j): math.exp(x[i] @ same[j] / t)
                for j in range(len(same))
                if j != i + offset
            }
            total -= math.log(score["other", i + offset] / sum(score.values())) / n
    return total


@pytest.mark.parametrize(("rows", "offset"), [(7, 0), (3, 4)])
def test_nt_xent_against_a_loop(rows, offset):
    all_a, all_b = sphere(7, 5, seed=3), sphere(7, 5, seed=4)
    part = slice(offset, offset + rows)
    a, b = all_a[part], all_b[part]
    expected = loop(*(x.numpy() for x in (a, b, all_a, all_b)), 0.5, offset)
    assert nt_xent(a, b, all_a, all_b, 0.5, offset).item() == pytest.approx(expected, rel=1e-6)


def test_nt_xent_is_twice_the_usual_mean():
    """The usual form: all 2 N features in one list, mean over 2 N anchors (eq. 1)."""
    a, b, t = sphere(6, 5, seed=5), sphere(6, 5, seed=6), 0.1
    z = np.concatenate([a, b])
    score = np.exp(z @ z.T / t)
    np.fill_diagonal(score, 0)
    partner = np.roll(np.arange(12), 6)
    usual = -np.log(score[np.arange(12), partner] / score.sum(1)).mean()
    assert nt_xent(a, b, a, b, t).item() == pytest.approx(2 * usual, rel=1e-5)


def test_gradients():
    a, b, keys = (sphere(n, 4, seed=n).requires_grad_() for n in (3, 3, 5))

    def contrast(a, b):
        return nt_xent(a, b, a, b, 0.5)

    assert torch.autograd.gradcheck(lambda q, k: infonce(q, k, 0.5, 1), (a, keys))
    assert torch.autograd.gradcheck(contrast, (a, b))


def test_autocast_does_not_touch_them():
    a, b = sphere(6, 5, seed=7).float(), sphere(6, 5, seed=8).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = infonce(a, b, 0.1), nt_xent(a, b, a, b, 0.1)
    assert found == (infonce(a, b, 0.1), nt_xent(a, b, a, b, 0.1))
