"""Nearest centres, k-means on known clusters, and how much of a codebook is used."""

import math

import pytest
import torch

from contramask.functional import kmeans as module
from contramask.functional.kmeans import kmeans, nearest, perplexity
from contramask.types import UserError
from tests.builders import randn


def test_nearest_against_a_loop(monkeypatch):
    x, centres = randn(23, 5), randn(7, 5, seed=1)
    expected = [min(range(7), key=lambda k: float((row - centres[k]).norm())) for row in x]
    assert nearest(x, centres).tolist() == expected
    monkeypatch.setattr(module, "CHUNK", 3 * 7)  # three rows at once
    assert nearest(x, centres).tolist() == expected


def clusters(count=6, rows=300, width=4):
    middles = 10 * randn(count, width, seed=3)
    own = torch.arange(rows) % count
    return middles, middles[own] + 0.1 * randn(rows, width, seed=4), own


def test_it_finds_clusters():
    """Ten centres a cluster: rows of noise 0.1 in 4 dimensions are 0.2 from the middle."""
    middles, x, _ = clusters(rows=1200)
    centres = kmeans(x, 60, steps=60, batch=300, seed=1)
    apart = (x - centres[nearest(x, centres)]).norm(dim=1)
    assert apart.mean() < 0.17
    assert apart.max() < 1
    assert (centres[nearest(middles, centres)] - middles).norm(dim=1).max() < 0.3


def test_lone_centres_are_moved_to_what_is_far():
    """Rows of which nearly all are one: random beginnings leave most words unused."""
    x = torch.cat([torch.zeros(900, 3), randn(100, 3)])
    stuck = perplexity(nearest(x, kmeans(x, 20, steps=9, batch=400)), 20)[1]  # never looked
    used = perplexity(nearest(x, kmeans(x, 20, steps=100, batch=400)), 20)[1]
    assert stuck < 10
    assert used == 20


def test_one_step_is_the_mean_of_what_came():
    x = randn(30, 3)
    start = x[torch.randperm(30, generator=torch.Generator().manual_seed(5))[:4]]
    generator = torch.Generator().manual_seed(5)
    torch.randperm(30, generator=generator)
    rows = x[torch.randint(30, (12,), generator=generator)]
    ids = nearest(rows, start)
    found = kmeans(x, 4, steps=1, batch=12, seed=5)
    for k in range(4):
        mine = rows[ids == k]
        torch.testing.assert_close(found[k], mine.mean(0) if len(mine) else start[k])


def test_a_function_of_the_arguments():
    _, x, _ = clusters()
    steps = []
    first = kmeans(x, 8, steps=25, batch=50, seed=2, tell=steps.append)
    assert steps == list(range(1, 26))
    torch.manual_seed(99)
    assert torch.equal(kmeans(x, 8, steps=25, batch=50, seed=2), first)
    assert not torch.equal(kmeans(x, 8, steps=25, batch=50, seed=3), first)


def test_too_few_rows():
    with pytest.raises(UserError, match="3 patches for a vocabulary of 4"):
        kmeans(randn(3, 2), 4)


def test_perplexity_in_closed_form():
    assert perplexity(torch.arange(12) % 6, 9) == pytest.approx((6, 6))
    assert perplexity(torch.full((5,), 2), 9) == pytest.approx((1, 1))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert perplexity(torch.tensor([[1, 1], [1, 8]]), 9) == pytest.approx((math.exp(entropy), 2))
