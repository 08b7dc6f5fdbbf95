"""The weighted nearest-neighbour vote."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from contramask.functional.neighbours import nearest, vote
from contramask.types import UserError

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
    assert vote(query, bank, y, ks=(3,), classes=2, temperature=0.01)[3].argmax() == 0
    assert vote(query, bank, y, ks=(3,), classes=2, temperature=10.0)[3].argmax() == 1


def test_no_query_gives_no_row():
    assert vote(unit(Q)[:0], unit(N), labels(N), ks=(2,), classes=C)[2].shape == (0, C)


def test_the_nearest_come_first():
    products, places = nearest(unit(Q), unit(N, 1), k=5, elements=2 * N)
    assert (products.diff(dim=1) <= 0).all()
    torch.testing.assert_close(products, (unit(Q) @ unit(N, 1).mT).gather(1, places))


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
