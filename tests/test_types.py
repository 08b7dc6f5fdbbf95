"""The nouns: seeds of places, rows of a global batch, masks in patch space."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contramask.types import Mask, Pass, Spec, Step, Tokens, UserError, fold
from tests.builders import randn


def test_user_errors_are_value_errors():
    assert issubclass(UserError, ValueError)


def test_spec_counts_patches():
    assert Spec(dim=12, patch=4, grid=(4, 5), depth=2).patches == 20


def test_fold_is_frozen():
    # Another hash would change every run on resume: these numbers must never move.
    assert fold(0, 0, "mask/random") == 6096079019670758127
    assert fold("a") != fold("b")
    assert fold(1, 23) != fold(12, 3)


@given(st.lists(st.one_of(st.integers(), st.text()), min_size=1))
def test_fold_is_a_seed(place):
    seed = fold(*place)
    assert seed == fold(*place)
    assert 0 <= seed < 2**63


def test_rand_is_frozen():
    found = Step(3, 0.5, seed=7).rand("x", 2, 3)
    expected = [[0.4977987, 0.5170956, 0.0724983], [0.8049159, 0.2575451, 0.6292077]]
    torch.testing.assert_close(found, torch.tensor(expected), atol=5e-7, rtol=0)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from([(1, 8), (2, 4), (4, 2)]))
def test_rows_belong_to_the_global_batch(index, seed, split):
    """8 images in 1, 2 or 4 micro-batches or ranks draw the same numbers."""
    parts, size = split
    whole = Step(index, 0.0, seed, row=0, rows=8).rand("noise", 8, 3, 5)
    for part in range(parts):
        row = part * size
        found = Step(index, 0.0, seed, row=row, rows=8).rand("noise", size, 3, 5)
        assert torch.equal(found, whole[row : row + size])
    assert whole.shape == (8, 3, 5)
    assert whole.min() >= 0
    assert whole.max() < 1


@pytest.mark.parametrize(
    "other", [(Step(4, 0.0, 1), "a"), (Step(3, 0.0, 2), "a"), (Step(3, 0.0, 1), "b")]
)
def test_other_places_draw_other_numbers(other):
    step, name = other
    here = Step(3, 0.0, 1)
    assert not torch.equal(step.rand(name, 4, 6), here.rand("a", 4, 6))
    assert not torch.equal(
        torch.rand(9, generator=step.generator(name)), torch.rand(9, generator=here.generator("a"))
    )


def test_progress_draws_nothing():
    """The same step of a longer training hides the same patches."""
    assert torch.equal(Step(3, 0.1).rand("a", 4, 6), Step(3, 0.9).rand("a", 4, 6))


def test_generators_belong_to_micro_batches():
    a, b = (Step(3, 0.0, row=row, rows=8).generator("a") for row in (0, 4))
    assert not torch.equal(torch.rand(9, generator=a), torch.rand(9, generator=b))


def test_draws_leave_the_global_stream_alone():
    before = torch.get_rng_state()
    Step(0, 0.0).rand("a", 3, 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_kept_is_in_grid_order():
    hidden = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 1, 1]]).bool()
    mask = Mask(hidden, hidden[:, None], 3)
    assert mask.kept().tolist() == [[1, 3, 4], [0, 1, 2]]


def test_kept_needs_equal_numbers():
    hidden = torch.tensor([[1, 0, 1], [0, 0, 1]]).bool()
    with pytest.raises(ValueError, match="give the mask a fill"):
        Mask(hidden, hidden[:, None]).kept()


def test_class_token_is_the_first_of_the_prefix():
    prefix = randn(2, 3, 12)
    assert torch.equal(Tokens(prefix, randn(2, 20, 12)).cls, prefix[:, 0])


def test_passes_are_equal_by_what_they_compute():
    assert Pass("a", "m") == Pass("a", mask="m", net="student", layers=())
    texts = {str(p) for p in (Pass("a"), Pass("a", "m"), Pass("a", net="teacher"))}
    texts |= {str(Pass("a", layers=(0, 3))), str(Pass("a", layers=(0,)))}
    assert len(texts) == 5
    assert str(Pass("a", "m", "teacher", (1,))) == "teacher · a · masked by m · with blocks 1"
