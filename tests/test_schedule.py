"""Schedules: closed forms at the ends, in the middle, and against another way of writing them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contramask.schedule import Schedule, at
from contramask.types import UserError

FRACTION = st.floats(0, 1)
NUMBER = st.floats(-10, 10)


def test_cosine_with_warm_up():
    s = Schedule(peak=8.0, end=2.0, start=1.0, warmup=0.2)
    assert s(0.0) == 1.0
    assert s(0.1) == 4.5
    assert s(0.2) == 8.0
    assert s(0.6) == pytest.approx(5.0)
    assert s(1.0) == pytest.approx(2.0)
    assert s(1.5) == pytest.approx(2.0)  # a run that is trained on stays at the end


def test_linear_constant_and_steps():
    assert Schedule(peak=8.0, end=2.0, warmup=0.2, shape="linear")(0.6) == pytest.approx(5.0)
    assert Schedule(peak=8.0, warmup=0.5, shape="constant")(0.25) == 4.0
    assert Schedule(peak=8.0, warmup=0.5, shape="constant")(1.0) == 8.0
    steps = Schedule(peak=8.0, shape="steps", milestones=(0.5, 0.75), factor=0.5)
    assert [steps(p) for p in (0.0, 0.49, 0.5, 0.74, 0.75, 1.0)] == [8, 8, 4, 4, 2, 2]


def test_momentum_rises():
    """MoCo v3: 1 - (1 - m) (1 + cos(pi p)) / 2."""
    s = Schedule(peak=0.99, end=1.0)
    for p in (0.0, 0.3, 0.7, 1.0):
        assert s(p) == pytest.approx(1 - 0.01 * (1 + math.cos(math.pi * p)) / 2, rel=1e-12)


@given(NUMBER, NUMBER, NUMBER, st.floats(0, 0.99), FRACTION)
def test_stays_between_its_values(peak, end, start, warmup, progress):
    value = Schedule(peak=peak, end=end, start=start, warmup=warmup)(progress)
    low, high = min(peak, end, start), max(peak, end, start)
    assert low - 1e-9 <= value <= high + 1e-9


@given(NUMBER, NUMBER, st.floats(0.01, 0.99))
def test_no_jump_after_the_warm_up(peak, start, warmup):
    s = Schedule(peak=peak, start=start, warmup=warmup)
    before = s(math.nextafter(warmup, 0))
    assert s(warmup) == peak
    assert before == pytest.approx(peak, abs=1e-6)


@given(FRACTION, FRACTION)
def test_cosine_falls(p, q):
    s = Schedule(peak=1.0)
    assert s(min(p, q)) >= s(max(p, q))


@pytest.mark.parametrize("warmup", [-0.1, 1.0, 40.0])
def test_warm_up_is_a_fraction(warmup):
    with pytest.raises(UserError, match=r"warmup is .*below 1 together.*40 of 800 epochs are 0.05"):
        Schedule(peak=1.0, warmup=warmup)


def test_at():
    assert at(0.3, 0.9) == 0.3
    assert at(Schedule(peak=2.0, shape="linear"), 0.5) == 1.0
