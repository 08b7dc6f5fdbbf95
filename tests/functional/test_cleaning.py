"""Cleaning features: by hand, by scikit-learn, by parts."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from contramask.functional import cleaning
from contramask.functional.cleaning import Cleaning, fit
from contramask.types import UserError
from tests.builders import randn

N, F = 53, 7


def loud(rows: int = N, seed: int = 0) -> torch.Tensor:
    """Rows whose channels differ in mean and spread, and hang together."""
    mixed = randn(rows, F, seed=seed) @ randn(F, F, seed=9)
    return mixed * torch.tensor([1.0, 30.0, 0.1, 2.0, 300.0, 0.5, 5.0]) + 40


def cleaner(word: str, rows: torch.Tensor | None = None) -> cleaning.Cleaner:
    return fit(Cleaning.parse(word), loud() if rows is None else rows)


@pytest.mark.parametrize("word", ["raw", "zscore", "pca", "pca64", "top1", "top200"])
def test_words_are_read_and_written(word: str):
    assert str(Cleaning.parse(word)) == word
    number = "".join(c for c in word if c.isdigit())
    assert number in Cleaning.parse(word).about()


@pytest.mark.parametrize("word", ["", "Raw", "top", "top0", "pca0", "top-3", "zscore5", "top5 "])
def test_another_word_is_named(word: str):
    with pytest.raises(UserError, match="allowed are raw, zscore, pca, pca64"):
        Cleaning.parse(word)


def test_by_hand():
    x = torch.tensor([[1.0, 10.0, 7.0], [3.0, 50.0, 7.0]])
    y = torch.tensor([[2.0, 70.0, 9.0]])
    assert torch.equal(cleaner("raw", x)(y), y)
    torch.testing.assert_close(cleaner("zscore", x)(y), torch.tensor([[0.0, 2.0, 0.0]]))
    assert torch.equal(cleaner("top1", x)(y), torch.tensor([[2.0, 9.0]]))
    assert torch.equal(cleaner("top2", x)(y), torch.tensor([[9.0]]))
    # One direction varies: (2, 40) / sqrt(1604) with standard deviation sqrt(401).
    along = ((2 - 2) * 2 + (70 - 30) * 40) / (1604**0.5 * 401**0.5)
    torch.testing.assert_close(cleaner("pca", x)(y), torch.tensor([[along]]))
    assert cleaner("pca", x).variance.tolist() == [1, 400, 0]


def test_z_scores_and_whitening_are_those_of_scikit_learn():
    x, y = loud().double(), loud(11, seed=1)
    theirs = StandardScaler().fit(x.numpy()).transform(y.double().numpy())
    np.testing.assert_allclose(cleaner("zscore")(y), theirs, rtol=1e-4, atol=1e-4)
    pca = PCA(5, whiten=True, svd_solver="full").fit(x.numpy())
    theirs = pca.transform(y.double().numpy()) * (N / (N - 1)) ** 0.5  # theirs divides by N - 1
    found = cleaner("pca5")(y).numpy()
    signs = np.sign((found * theirs).sum(0))
    np.testing.assert_allclose(found, theirs * signs, rtol=1e-3, atol=1e-3)


@given(st.integers(1, F - 1))
def test_removed_are_the_channels_that_vary_most(m: int):
    x, y = loud().numpy(), loud(11, seed=1).numpy()
    expected = np.delete(y, np.argsort(-x.var(0))[:m], axis=1)
    found = cleaner(f"top{m}")
    assert found.width == F - m
    np.testing.assert_array_equal(found(torch.from_numpy(y)), expected)


@pytest.mark.parametrize("word", ["zscore", "pca"])
def test_train_has_mean_zero_and_variance_one_however_far_it_is_from_zero(word: str):
    x = cleaner(word, loud() + 1e4)(loud() + 1e4).double()
    torch.testing.assert_close(x.mean(0), torch.zeros(F).double(), rtol=0, atol=2e-2)
    torch.testing.assert_close(x.var(0, correction=0), torch.ones(F).double(), rtol=2e-2, atol=0)


def test_what_does_not_vary_is_not_blown_up():
    """Channel 2 differs by the last bit of float32 only, channel 4 is the sum of two others."""
    x = loud()
    x[:, 2] = 1000 + torch.arange(N) % 2 * 2**-14
    x[:, 4] = x[:, 0] + x[:, 1]
    z = cleaner("zscore", x)(x)
    assert z[:, 2].eq(0).all()
    assert (z.var(0, correction=0) > 0.9).sum() == F - 1
    assert cleaner("pca", x).width == F - 2
    assert cleaner("pca", x[:3]).width == 2  # three points span two directions
    assert cleaner("zscore", x[:1])(x).eq(0).all()


@pytest.mark.parametrize("word", ["zscore", "pca", "pca3", "top2", "raw"])
def test_chunks_and_ranks_change_nothing(word: str, monkeypatch: pytest.MonkeyPatch):
    x, y = loud(), loud(11, seed=1)
    expected = cleaner(word)(y)
    monkeypatch.setattr(cleaning, "ELEMENTS", 3 * F + 1)
    torch.testing.assert_close(cleaner(word)(y), expected)
    assert torch.equal(cleaner(word)(y[:0]), expected[:0])
    # The sums of three ranks, one of them without a row, in the order in which they are asked for.
    parts, asked = [x[:30], x[:0], x[30:]], []

    def spy(mine: torch.Tensor) -> torch.Tensor:
        asked.append(mine)
        return mine

    fit(Cleaning.parse(word), x, total=spy)
    assert len(asked) == 2
    for part in parts:
        own = iter(asked.copy())
        found = fit(Cleaning.parse(word), part, total=lambda mine, own=own: next(own))
        torch.testing.assert_close(found(y), expected)


def test_sums_are_of_this_ranks_rows():
    """What `total` is given adds up to the whole."""
    seen: list[torch.Tensor] = []

    def spy(mine: torch.Tensor) -> torch.Tensor:
        seen.append(mine)
        return mine

    for part in (loud()[:20], loud()[20:], loud()):
        fit(Cleaning.parse("zscore"), part, total=spy)
    first, second, whole = seen[::2]
    torch.testing.assert_close(first + second, whole)
    assert whole[1].eq(N).all()


@pytest.mark.parametrize(("word", "allowed"), [("top7", r"1\.\.6"), ("pca8", r"1\.\.7")])
def test_a_number_beyond_the_width_is_named(word: str, allowed: str):
    with pytest.raises(UserError, match=f"features of width 7 allow {allowed}; set cleanings"):
        cleaner(word)


@pytest.mark.parametrize("word", ["raw", "zscore", "pca", "top2"])
def test_rows_that_cannot_be_are_named(word: str):
    with pytest.raises(UserError, match="train has no row"):
        cleaner(word, torch.zeros(0, F))
    broken = loud()
    broken[3, 5] = torch.nan
    with pytest.raises(UserError, match="1 of 7 channels of train are not finite"):
        cleaner(word, broken)


def test_whitening_of_equal_rows_is_named():
    with pytest.raises(UserError, match="no direction varies"):
        cleaner("pca", torch.full((5, F), 3.0))


def test_half_precision_is_cleaned_in_float32():
    x = loud().half()
    found = cleaner("zscore", x)(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, cleaner("zscore", x.float())(x.float()))


@pytest.mark.parametrize("word", ["zscore", "pca", "top2", "raw"])
def test_a_row_is_cleaned_alike_in_any_company(word: str):
    x = loud(3000)
    found = cleaner(word, x)
    whole = found(x)
    assert torch.equal(torch.cat([found(x[:1]), found(x[1:40]), found(x[40:])]), whole)
    torch.testing.assert_close(whole.mean(0), found.centre, rtol=1e-4, atol=1e-4)
