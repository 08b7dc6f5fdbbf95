"""J and F of masks, by hand and against scipy's morphology."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from contramask.functional.contours import (
    contour_accuracy,
    contours,
    dilate,
    reach,
    region_similarity,
)


def masks(rows: str) -> torch.Tensor:
    """One mask of lines of . and #."""
    return torch.tensor([[c == "#" for c in line.strip()] for line in rows.strip().splitlines()])[
        None
    ]


def blobs(count: int, height: int, width: int, seed: int) -> torch.Tensor:
    """Smooth random masks; some are empty, some full."""
    noise = np.random.default_rng(seed).normal(size=(count, height, width))
    smooth = ndimage.gaussian_filter(noise, (0, 3, 3))
    return torch.from_numpy(smooth > np.random.default_rng(seed + 1).normal(0, 0.1, (count, 1, 1)))


def border(mask: np.ndarray) -> np.ndarray:
    """The contour of the official evaluation, pixel by pixel."""
    height, width = mask.shape
    found = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            if y == height - 1 and x == width - 1:
                continue
            if y == height - 1:
                found[y, x] = mask[y, x] != mask[y, x + 1]
            elif x == width - 1:
                found[y, x] = mask[y, x] != mask[y + 1, x]
            else:
                others = (mask[y, x + 1], mask[y + 1, x], mask[y + 1, x + 1])
                found[y, x] = any(mask[y, x] != other for other in others)
    return found


def f_by_scipy(found: np.ndarray, truth: np.ndarray, tolerance: float) -> float:
    radius = math.ceil(tolerance * math.hypot(*found.shape))
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    element = x**2 + y**2 <= radius**2
    mine, theirs = border(found), border(truth)
    if not mine.any() or not theirs.any():
        return float(mine.any() == theirs.any())
    near_theirs = ndimage.binary_dilation(theirs, element)
    near_mine = ndimage.binary_dilation(mine, element)
    precision = (mine & near_theirs).sum() / mine.sum()
    recall = (theirs & near_mine).sum() / theirs.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_a_contour_by_hand():
    found = contours(
        masks("""
        .......
        ..##...
        ..##...
        ......#
        ....###
        """)
    )
    expected = masks("""
        .###...
        .#.#...
        .###.##
        ...###.
        ...#...
        """)
    assert torch.equal(found, expected)


def test_the_border_of_the_image_is_no_contour():
    assert not contours(torch.ones(2, 5, 7, dtype=torch.bool)).any()


def test_a_disk_grows_around_a_pixel():
    point = torch.zeros(1, 9, 11, dtype=torch.bool)
    point[0, 4, 5] = True
    grown = dilate(point, 3)
    y, x = np.mgrid[:9, :11]
    assert np.array_equal(grown[0].numpy(), (y - 4) ** 2 + (x - 5) ** 2 <= 9)
    assert torch.equal(dilate(point, 0), point)


@pytest.mark.parametrize("radius", [1, 2, 5, 20])
def test_dilation_is_scipys_also_at_the_border(radius: int):
    found = dilate(blobs(3, 17, 23, radius), radius)
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    for mask, grown in zip(blobs(3, 17, 23, radius), found, strict=True):
        theirs = ndimage.binary_dilation(mask.numpy(), x**2 + y**2 <= radius**2)
        assert np.array_equal(grown.numpy(), theirs)


def test_the_reach_at_the_size_of_davis():
    assert reach(480, 854) == 8
    assert reach(3, 4) == 1


def test_j_by_hand():
    found = masks("""
        .##..
        .##..
        """)
    truth = masks("""
        ..##.
        ..##.
        """)
    nothing = torch.zeros_like(found)
    rows = [(found, truth, 2 / 6), (found, found, 1), (found, nothing, 0), (nothing, nothing, 1)]
    for a, b, expected in rows:
        assert region_similarity(a, b).item() == pytest.approx(expected)
        assert region_similarity(b, a).item() == pytest.approx(expected)


def test_f_by_hand():
    """Two bars of one contour each, five columns apart: within reach 5, out of reach 4."""
    found, truth = torch.zeros(1, 30, 40, dtype=torch.bool), torch.zeros(1, 30, 40).bool()
    found[:, :, :10] = True
    truth[:, :, :15] = True
    assert contour_accuracy(found, truth, tolerance=5 / 50).item() == 1.0  # the diagonal is 50
    assert contour_accuracy(found, truth, tolerance=4 / 50).item() == 0.0
    truth[:, 20:] = False  # what is left of the contour, 19 rows, and the edge below it
    mine, theirs = contours(found), contours(truth)
    assert (mine.sum(), theirs.sum()) == (30, 20 + 14)
    # Row r of the found contour sees the true one if r <= 19 + 0, but the edge below is near too:
    # (19, 9) lies on it, so rows up to 24 are within 5.
    precision, recall = 25 / 30, (20 + 10) / 34
    assert contour_accuracy(found, truth, tolerance=5 / 50).item() == pytest.approx(
        2 * precision * recall / (precision + recall)
    )


def test_f_without_contours():
    nothing, full = torch.zeros(1, 6, 8, dtype=torch.bool), torch.ones(1, 6, 8, dtype=torch.bool)
    some = nothing.clone()
    some[0, 2, 3] = True
    for a, b, expected in ((nothing, nothing, 1), (nothing, full, 1), (some, nothing, 0)):
        assert contour_accuracy(a, b).item() == expected
        assert contour_accuracy(b, a).item() == expected


@settings(max_examples=15)
@given(
    st.integers(0, 10_000), st.integers(2, 33), st.integers(2, 47), st.sampled_from([0.008, 0.06])
)
def test_f_is_that_of_scipys_morphology(seed: int, height: int, width: int, tolerance: float):
    found, truth = blobs(3, height, width, seed), blobs(3, height, width, seed + 7)
    truth[0] = found[0].roll(1, dims=1)  # one pair that agrees nearly
    scores = contour_accuracy(found, truth, tolerance=tolerance)
    for score, a, b in zip(scores, found, truth, strict=True):
        assert score.item() == pytest.approx(f_by_scipy(a.numpy(), b.numpy(), tolerance))
