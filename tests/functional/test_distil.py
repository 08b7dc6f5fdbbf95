"""Self-distillation: closed forms and loops in NumPy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from contramask.functional.distil import centred, cross_entropy, cross_view, koleo, sinkhorn
from tests.builders import randn


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_centred_targets():
    x, centre = randn(3, 5, seed=0).double(), randn(5, seed=1).double()
    expected = softmax((x.numpy() - centre.numpy()) / 0.04)
    np.testing.assert_allclose(centred(x, centre, 0.04).numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("crops", [2, 5])
def test_cross_view_is_a_double_loop(crops, same):
    scores = randn(crops, 3, 7, seed=0).double()
    targets = randn(2, 3, 7, seed=1).double().softmax(-1)
    pairs = []
    for g in range(2):
        for v in range(crops):
            if v != g or same:
                logs = np.log(softmax(scores[v].numpy() / 0.1))
                pairs.append(-(targets[g].numpy() * logs).sum(1).mean())
    found = cross_view(scores, targets, 0.1, same=same)
    assert found.item() == pytest.approx(np.mean(pairs), rel=1e-10)


def test_untrained_distillation_is_log_k():
    targets = randn(2, 3, 11, seed=1).softmax(-1)
    assert cross_view(torch.zeros(4, 3, 11), targets, 0.1).item() == pytest.approx(math.log(11))
    assert cross_entropy(torch.zeros(3, 11), targets[0], 0.1).tolist() == pytest.approx(
        [math.log(11)] * 3
    )


def official_sinkhorn(scores: np.ndarray, temperature: float, iterations: int) -> np.ndarray:
    """As published: prototypes in rows, divided by K and then by the batch."""
    q = np.exp(scores / temperature).T
    q /= q.sum()
    for _ in range(iterations):
        for k in range(len(q)):
            q[k] /= q[k].sum() * q.shape[0]
        for i in range(q.shape[1]):
            q[:, i] /= q[:, i].sum() * q.shape[1]
    return (q * q.shape[1]).T


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_is_the_published_loop(iterations):
    scores = randn(7, 4, seed=2).double()
    found = sinkhorn(scores, 0.3, iterations=iterations)
    expected = official_sinkhorn(scores.numpy(), 0.3, iterations)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)


@given(st.integers(2, 9), st.integers(2, 6), st.integers(0, 99))
def test_sinkhorn_uses_all_prototypes_alike(rows, prototypes, seed):
    q = sinkhorn(randn(rows, prototypes, seed=seed).double(), 1.0, iterations=300)
    torch.testing.assert_close(q.sum(1), torch.ones(rows).double())
    expected = torch.full((prototypes,), rows / prototypes).double()
    torch.testing.assert_close(q.sum(0), expected, rtol=1e-3, atol=0)


def test_sinkhorn_survives_large_scores():
    """exp(10 / 0.04) is no float32; a constant added to all scores changes nothing."""
    scores = randn(6, 5, seed=3)
    q = sinkhorn(10 * scores + 500, 0.04)
    assert q.isfinite().all()
    torch.testing.assert_close(sinkhorn(scores + 3, 0.1), sinkhorn(scores, 0.1))


def test_sinkhorn_of_no_rows():
    assert sinkhorn(torch.zeros(0, 5), 0.1).shape == (0, 5)


def test_koleo_is_a_loop():
    x = randn(6, 5, seed=4).double()
    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    expected = 0.0
    for i in range(6):
        others = [np.linalg.norm(unit[i] - unit[j] + 1e-8) for j in range(6) if j != i]
        expected -= math.log(min(others) + 1e-8) / 6
    assert koleo(x).item() == pytest.approx(expected, rel=1e-7)


def test_koleo_of_a_simplex():
    """Three points at equal distances on a circle: sqrt(3) each."""
    angles = torch.arange(3) * 2 * math.pi / 3
    points = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [5.0], [0.1]])
    assert koleo(points).item() == pytest.approx(-math.log(math.sqrt(3)), abs=1e-5)


def test_koleo_pushes_apart_and_survives_twins():
    x = F.normalize(randn(4, 3, seed=5), dim=1)
    x[1] = x[0]
    x.requires_grad_()
    loss = koleo(x)
    loss.backward()
    assert loss.isfinite()
    assert x.grad is not None
    assert x.grad.isfinite().all()
