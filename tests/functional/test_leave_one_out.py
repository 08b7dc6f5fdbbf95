"""The vote of the nearest others: a loop, scikit-learn, duplicates."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from contramask.functional.leave_one_out import leave_one_out_votes
from contramask.types import UserError
from tests.builders import randn

N, D, C = 19, 5, 4


def case(rows: int = N, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(randn(rows, D, seed=seed), dim=1), torch.randint(
        C, (rows,), generator=generator
    )


def by_loop(x: np.ndarray, y: np.ndarray, k: int, temperature: float) -> np.ndarray:
    votes = np.zeros((len(x), C))
    for i in range(len(x)):
        cosines = {n: float(x[i] @ x[n]) for n in range(len(x)) if n != i}
        for n in sorted(cosines, key=lambda n: -cosines[n])[:k]:
            votes[i, y[n]] += math.exp(cosines[n] / temperature)
    return votes


@pytest.mark.parametrize("elements", [2**26, 2 * N])
def test_votes_are_those_of_the_definition(elements):
    x, y = case()
    found = leave_one_out_votes(
        x, y, ks=(6, 1, N - 1), classes=C, temperature=0.3, elements=elements
    )
    assert list(found) == [6, 1, N - 1]
    for k, votes in found.items():
        expected = by_loop(x.double().numpy(), y.numpy(), k, 0.3)
        np.testing.assert_allclose(votes, expected, rtol=1e-5)


def test_predictions_are_those_of_scikit_learn():
    x, y = case(80)
    found = leave_one_out_votes(x, y, ks=(3, 20), classes=C)
    for k, votes in found.items():
        for i in range(len(x)):
            rest = torch.arange(len(x)) != i
            theirs = KNeighborsClassifier(
                n_neighbors=k,
                algorithm="brute",
                metric="cosine",
                weights=lambda distance: np.exp((1 - distance.astype(np.float64)) / 0.07),
            ).fit(x[rest].numpy(), y[rest].numpy())
            p = theirs.predict_proba(x[i : i + 1].numpy())[0]
            share = votes[i] / votes[i].sum()
            np.testing.assert_allclose(share, p, rtol=1e-3, atol=1e-5)


def test_duplicates_vote_for_each_other():
    """Of five equal rows, each is found by none or all; four others vote, none of them itself."""
    x, _ = case(9)
    x[2:7] = x[2]
    y = torch.tensor([3, 3, 0, 0, 1, 1, 1, 3, 3])
    votes = leave_one_out_votes(x, y, ks=(4,), classes=C, temperature=1.0)[4]
    for i in range(2, 7):
        others = [y[n].item() for n in range(2, 7) if n != i]
        expected = torch.tensor([others.count(c) for c in range(C)]) * math.e
        torch.testing.assert_close(votes[i], expected)


def test_more_duplicates_than_neighbours():
    """The row itself need not be among the k + 1 then; k votes of others remain."""
    x = torch.ones(30, 1)
    votes = leave_one_out_votes(x, torch.arange(30), ks=(2, 3), classes=30, temperature=1.0)
    for k, found in votes.items():
        torch.testing.assert_close(found.sum(1), torch.full((30,), k * math.e))
        assert found.diagonal().eq(0).all()  # a class each: nobody voted for its own


def test_rows_of_zeros_vote_alike_and_are_not_nan():
    votes = leave_one_out_votes(torch.zeros(6, D), torch.zeros(6).long(), ks=(5,), classes=2)[5]
    assert votes.tolist() == [[5, 0]] * 6


@pytest.mark.parametrize("ks", [(N,), (0,), (), (2, -1)])
def test_a_k_that_cannot_be_is_named(ks):
    x, y = case()
    with pytest.raises(UserError, match=rf"{N} rows allow k in 1\.\.{N - 1}; set"):
        leave_one_out_votes(x, y, ks=ks, classes=C)


def test_nobody_votes_for_one_row_or_none():
    for rows in (0, 1):
        with pytest.raises(UserError, match="give more images"):
            leave_one_out_votes(torch.ones(rows, D), torch.zeros(rows).long(), ks=(1,), classes=C)
