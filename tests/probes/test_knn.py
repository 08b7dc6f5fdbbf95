"""The k-NN probe."""

import pytest
import torch

from contramask.probes.knn import KNN
from contramask.types import UserError

N, F, C = 31, 6, 3


def rows(number: int = N, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(C, (number,), generator=generator)
    return torch.randn(number, F, generator=generator) + 8 * torch.eye(F)[y], y


def test_learning_in_parts_is_learning_at_once():
    x, y = rows()
    at_once, in_parts = KNN(C, ks=(4,)), KNN(C, ks=(4,))
    at_once.fit(x, y)
    for part in torch.arange(N).split(7):
        in_parts.learn(x[part], y[part])
    assert torch.equal(at_once.predict(x), in_parts.predict(x))


def test_fit_forgets_what_was_learnt():
    x, y = rows()
    probe = KNN(C, ks=(4,))
    probe.learn(x, (y + 1) % C)
    probe.fit(x, y)
    assert f"bank of {N} train" in probe.protocol
    assert torch.equal(probe.predict(x).argmax(1), y)


def test_lengths_of_features_do_not_matter():
    x, y = rows()
    v, _ = rows(9, seed=1)
    plain, scaled = KNN(C, ks=(5,)), KNN(C, ks=(5,))
    plain.fit(x, y)
    scaled.fit(x * torch.linspace(0.1, 50, N)[:, None], y)
    torch.testing.assert_close(plain.predict(v), scaled.predict(3 * v))


def test_every_k_from_one_search_and_the_first_predicts():
    x, y = rows()
    v, w = rows(9, seed=1)
    probe = KNN(C, ks=(20, 1))
    probe.fit(x, y)
    votes = probe.votes(v)
    assert list(votes) == [20, 1]
    assert torch.equal(probe.predict(v), votes[20])
    assert torch.equal(votes[20].argmax(1), w)  # classes far apart


def test_a_feature_of_zeros_is_no_accident():
    x, y = rows()
    probe = KNN(C, ks=(3,))
    probe.fit(torch.cat([x, torch.zeros(1, F)]), torch.cat([y, y[:1]]))
    assert probe.predict(torch.zeros(2, F)).isfinite().all()


def test_a_k_larger_than_the_bank_is_named():
    probe = KNN(C, ks=(10, 50))
    probe.fit(*rows())
    with pytest.raises(UserError, match=r"k is 50; the bank has 31"):
        probe.votes(torch.randn(2, F))


def test_an_empty_bank_is_named():
    with pytest.raises(UserError, match="bank is empty"):
        KNN(C).votes(torch.randn(2, F))
