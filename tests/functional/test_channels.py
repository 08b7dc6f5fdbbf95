"""Channels of high variance: closed forms and sets."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contramask.functional.channels import overlap, profile, top_channels, top_share
from contramask.functional.moments import Moments
from contramask.types import UserError
from tests.builders import randn


def test_a_known_profile():
    variance = torch.tensor([[1.0, 5.0, 4.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[0.5, 0.4, 0.1], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(profile(variance), expected)
    torch.testing.assert_close(top_share(variance, 2), torch.tensor([0.9, 0.0]))
    assert top_channels(variance, 2).tolist() == [[1, 2], [0, 1]]
    assert top_share(variance, 0).eq(0).all()
    assert top_channels(variance, 0).shape == (2, 0)


def test_of_equal_channels_the_first_are_taken():
    variance = torch.ones(500)
    variance[70] = 2
    assert top_channels(variance, 4).tolist() == [70, 0, 1, 2]


def test_loud_channels_of_features_are_found():
    loud = torch.tensor([2, 17, 5])
    scale = torch.ones(20)
    scale[loud] = torch.tensor([10.0, 20.0, 40.0])
    variance = Moments.of(randn(500, 20) * scale + 100).variance()
    assert top_channels(variance, 3).tolist() == [5, 17, 2]
    assert top_share(variance, 3).item() == pytest.approx(2100 / 2117, abs=2e-3)


@given(st.sets(st.integers(0, 30), max_size=12), st.sets(st.integers(0, 30), max_size=9))
def test_overlap_is_that_of_sets(first, second):
    a, b = (torch.tensor(list(s), dtype=torch.long) for s in (first, second))
    assert overlap(a, b) == len(first & second)


def test_overlap_of_layers():
    a, b = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 2, 0], [0, 1, 4]])
    assert overlap(a, b).tolist() == [2, 0]


@pytest.mark.parametrize("m", [-1, 4])
def test_an_m_that_cannot_be_is_named(m):
    for function in (top_share, top_channels):
        with pytest.raises(UserError, match=r"of 3 it is in 0\.\.3; set m"):
            function(torch.ones(3), m)
