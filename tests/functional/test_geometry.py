"""Where features lie: closed forms on the sphere, loops, NumPy and scipy."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

from contramask.functional.geometry import (
    alignment,
    feature_std,
    lidar,
    uniformity,
    uniformity_sums,
    unit_sums,
    view_moments,
)
from contramask.functional.moments import Moments
from tests.builders import randn


def test_alignment_of_known_angles():
    angle = torch.tensor([0.0, 0.3, math.pi / 2, math.pi])
    a = torch.tensor([[2.0, 0.0]]).expand(4, 2)  # any length
    b = 0.1 * torch.stack([angle.cos(), angle.sin()], 1)
    expected = 2 - 2 * angle.double().cos()
    torch.testing.assert_close(alignment(a, b), expected, rtol=1e-6, atol=1e-12)
    assert alignment(torch.zeros(1, 3), torch.eye(3)[:1]).tolist() == [1]


def uniformity_by_loop(x: np.ndarray, t: float) -> float:
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [np.exp(-t * ((a - b) ** 2).sum()) for a, b in itertools.combinations(x, 2)]
    return float(np.log(np.mean(pairs)))


@pytest.mark.parametrize("t", [2.0, 0.5])
def test_uniformity_against_a_loop(t):
    x = 5 * randn(9, 4)
    found = uniformity(uniformity_sums(x, t)).item()
    assert found == pytest.approx(uniformity_by_loop(x.double().numpy(), t), rel=1e-9)


def test_uniformity_of_random_directions_and_that_batches_add():
    """E exp(2 t cos) is 0F1(; D/2; t^2) on the sphere of dimension D - 1."""
    dim, t = 6, 2.0
    batches = randn(8, 250, dim)
    sums = torch.stack([uniformity_sums(x, t) for x in batches]).sum(0)
    assert sums[1] == 8 * 250 * 249 / 2
    expected = -2 * t + math.log(scipy.special.hyp0f1(dim / 2, t**2))
    assert uniformity(sums).item() == pytest.approx(expected, abs=0.02)


def test_uniformity_where_all_is_one_point():
    assert uniformity(uniformity_sums(torch.ones(5, 3))).item() == pytest.approx(0, abs=1e-12)
    for rows in (0, 1):
        assert uniformity(uniformity_sums(randn(rows, 3))) == 0
    assert uniformity(uniformity_sums(torch.zeros(4, 3))) == 0
    assert uniformity(uniformity_sums(torch.tensor([[1.0], [-1.0]]), 1e6)).isfinite()


def test_feature_std_against_numpy_and_that_batches_add():
    x = 3 * randn(50, 7) + 1
    unit = F.normalize(x.double(), dim=1).numpy()
    found = feature_std(unit_sums(x[:20]) + unit_sums(x[20:]))
    assert found.item() == pytest.approx(unit.std(0).mean(), rel=1e-9)


def test_feature_std_tells_isotropic_from_collapsed():
    assert feature_std(unit_sums(randn(20000, 64))).item() == pytest.approx(1 / 8, rel=1e-2)
    assert feature_std(unit_sums(randn(1, 5).expand(30, 5))).item() < 1e-7
    for x in (torch.zeros(4, 3), randn(0, 3)):
        assert feature_std(unit_sums(x)) == 0


def test_layers_are_taken_one_by_one():
    x = randn(2, 3, 10, 4)
    uniform, std = uniformity(uniformity_sums(x)), feature_std(unit_sums(x))
    assert uniform.shape == std.shape == (2, 3)
    for i, j in itertools.product(range(2), range(3)):
        assert uniform[i, j].item() == pytest.approx(uniformity(uniformity_sums(x[i, j])).item())
        assert std[i, j].item() == pytest.approx(feature_std(unit_sums(x[i, j])).item())


def lidar_by_loop(views: np.ndarray, delta: float) -> float:
    """Sums written out, the generalised eigenvalues by scipy."""
    images, count, dim = views.shape
    means = [v.mean(0) for v in views]
    middle = np.mean(means, 0)
    between, within = np.zeros((dim, dim)), np.zeros((dim, dim))
    for mean, image in zip(means, views, strict=True):
        between += np.outer(mean - middle, mean - middle) / images
        for view in image:
            within += np.outer(view - mean, view - mean) / (images * count)
    values = scipy.linalg.eigh(between, within + delta * np.eye(dim), eigvals_only=True)
    share = np.clip(values, 0, None) / values.sum()
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


@pytest.mark.parametrize("shape", [(11, 4, 3), (5, 2, 8), (6, 3, 6)])
@pytest.mark.parametrize("delta", [1e-4, 0.3])
def test_lidar_against_a_loop(shape, delta):
    views = randn(shape[0], 1, shape[2]) + 0.5 * randn(*shape, seed=1) + 2
    found = lidar(*view_moments(views), delta).item()
    assert found == pytest.approx(lidar_by_loop(views.double().numpy(), delta), rel=1e-6)


def test_lidar_of_known_clouds():
    """Images differ in 3 of 5 directions as much as 1, 4 and 9 times views do: shares 1, 4, 9."""
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)))  # 8 images, covariance 1
    means = torch.cat([signs * torch.tensor([1.0, 2.0, 3.0]), torch.zeros(8, 2)], 1).double()
    jitter = math.sqrt(5) * torch.cat([torch.eye(5), -torch.eye(5)]).double()  # covariance 1
    between, within = view_moments(means[:, None] + jitter)
    torch.testing.assert_close(within.covariance(), torch.eye(5).double())
    share = torch.tensor([1, 4, 9]) / 14
    expected = torch.exp(-(share * share.log()).sum()).item()
    assert lidar(between, within, 1e-9).item() == pytest.approx(expected, rel=1e-6)


def test_lidar_does_not_count_what_augmentations_change():
    """Two directions of ten belong to the images, the others to the views; RankMe sees all ten."""
    x = torch.zeros(400, 20, 10)
    x[..., :2] = randn(400, 1, 2) + 0.01 * randn(400, 20, 2, seed=1)
    x[..., 2:] = randn(400, 20, 8, seed=2)
    assert lidar(*view_moments(x)).item() == pytest.approx(2, abs=0.1)


def test_lidar_from_batches():
    views = randn(12, 3, 5)
    parts = [view_moments(part) for part in views.split([4, 1, 7])]
    between, within = (sum(side, Moments.empty(5)) for side in zip(*parts, strict=True))
    assert lidar(between, within).item() == pytest.approx(lidar(*view_moments(views)).item())


def test_lidar_of_what_says_nothing():
    for views in (torch.ones(4, 3, 2), randn(0, 3, 2), randn(4, 0, 2), randn(1, 3, 2)):
        assert lidar(*view_moments(views)).item() == pytest.approx(1)
    one_view = torch.eye(4)[:, None]  # Sb has rank 3, with equal eigenvalues
    assert lidar(*view_moments(one_view)).item() == pytest.approx(3)
