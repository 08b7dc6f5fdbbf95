"""The measure itself: it sees a wrong entry, and what was not kept through the norm."""

import pytest
import torch
from scripts.reduce_parity import MOST, thin

from tests.builders import randn
from tests.parity.deviations import deviation


@pytest.mark.parametrize("shape", [(), (5,), (24, 32), (3, 100, 7)])
def test_thinned_tensors_meet_every_row_and_column(shape):
    full = randn(*shape)
    kept = thin(full)
    assert kept["values"].numel() <= MOST
    assert kept["shape"] == shape
    marks = torch.zeros(full.numel())
    marks[:: kept["stride"]] = 1
    for axis in range(len(shape)):
        rest = [i for i in range(len(shape)) if i != axis]
        assert (marks.view(shape).sum(rest) > 0 if rest else marks > 0).all()
    for measure in ("absolute", "relative", "of_max"):
        assert deviation(full, kept, measure) == pytest.approx(0, abs=1e-12)
        assert deviation(full, full, measure) == 0


def test_a_wrong_entry_is_seen():
    full = randn(24, 32)
    kept = thin(full)
    wrong = full.clone()
    wrong.view(-1)[2 * kept["stride"]] += 0.5
    assert deviation(wrong, kept, "absolute") == pytest.approx(0.5)
    assert deviation(wrong, full, "of_max") == pytest.approx(0.5 / full.abs().max().item())
    assert deviation(torch.tensor(1.1), 1.0, "relative") == pytest.approx(0.1, rel=1e-5)


def test_what_was_not_kept_shows_in_the_norm():
    full = randn(24, 32)
    kept = thin(full)
    left = torch.ones(full.numel()).bool()
    left[:: kept["stride"]] = False
    wrong = full.clone().view(-1)
    wrong[left] *= 1.01
    assert deviation(wrong.view(24, 32), kept, "absolute") > 1e-3


def test_not_a_number_is_never_near():
    full = randn(24, 32)
    wrong = full.clone()
    wrong[0, 0] = torch.nan
    assert not deviation(wrong, full, "absolute") <= 1e9
    assert not deviation(wrong, thin(full), "absolute") <= 1e9


def test_sizes_have_to_agree():
    with pytest.raises(AssertionError):
        deviation(randn(3, 4), randn(4, 3), "absolute")
    with pytest.raises(AssertionError):
        deviation(randn(3, 5), thin(randn(4, 3)), "absolute")
