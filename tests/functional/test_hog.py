"""Histograms of oriented gradients: a loop over pixels, closed forms, and the order of numbers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from contramask.functional.hog import gaussian_window, hog, hog_of_patches
from contramask.types import UserError
from tests.builders import randn

SOBEL = [[1, 0, -1], [2, 0, -2], [1, 0, -1]]  # left minus right; transposed: top minus bottom


def by_loop(image: np.ndarray, bins: int, cell: int, window: int | None) -> np.ndarray:
    """The definition, pixel by pixel in float64: (C, bins, h, w)."""
    channels, height, width = image.shape
    out = np.zeros((channels, bins, height // cell, width // cell))
    for c in range(channels):
        padded = np.pad(image[c], 1, mode="reflect")
        for y in range(height):
            for x in range(width):
                gx = gy = 0.0
                for i in range(3):
                    for j in range(3):
                        gx += SOBEL[i][j] * padded[y + i, x + j]
                        gy += SOBEL[j][i] * padded[y + i, x + j]
                k = math.floor(math.atan2(gx, gy) / math.pi * bins) % bins
                size = math.hypot(gx, gy)
                if window is not None:
                    middle, sigma = (window - 1) / 2, window // 2
                    away = (y % window - middle) ** 2 + (x % window - middle) ** 2
                    size *= math.exp(-away / (2 * sigma**2))
                out[c, k, y // cell, x // cell] += size
    return out / np.linalg.norm(out, axis=1, keepdims=True)


@pytest.mark.parametrize(("bins", "cell", "window"), [(9, 4, 8), (7, 2, 4), (9, 8, None)])
def test_against_a_loop(bins, cell, window):
    image = randn(2, 3, 16, 24)
    found = hog(image, bins=bins, cell=cell, window=window)
    assert found.shape == (2, 3, bins, 16 // cell, 24 // cell)
    for b in range(2):
        expected = by_loop(image[b].double().numpy(), bins, cell, window)
        np.testing.assert_allclose(found[b].numpy(), expected, atol=2e-5)


def by_convolution(image: torch.Tensor, bins: int, cell: int, window: int) -> torch.Tensor:
    """The same with a convolution, as the authors' code has it: (B, C, bins, h, w)."""
    b, c, height, width = image.shape
    kernel = torch.tensor(SOBEL, dtype=torch.float32)
    kernels = torch.stack([kernel, kernel.T])[:, None]
    padded = F.pad(image.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="reflect")
    gx, gy = F.conv2d(padded, kernels).unflatten(0, (b, c)).unbind(2)
    size = torch.stack([gx, gy], -1).norm(dim=-1)
    size = size * gaussian_window(window).repeat(height // window, width // window)
    which = (torch.atan2(gx, gy) / math.pi * bins).floor().long() % bins
    out = torch.zeros(b, c, bins, height, width).scatter_(2, which[:, :, None], size[:, :, None])
    sums = out.unflatten(4, (-1, cell)).unflatten(3, (-1, cell)).sum((4, 6))
    return F.normalize(sums, dim=2)


def test_pictures_of_8_bits_as_by_convolution():
    """Their gradients often lie exactly between two bins: the order of sums decides."""
    noise = F.interpolate(randn(2, 3, 10, 12), size=(96, 112), mode="bicubic")
    levels = (noise * 40 + 120).clamp(0, 255).round()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    image = (levels / 255 - mean) / std
    expected = by_convolution(image, 9, 8, 16)
    torch.testing.assert_close(hog(image), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("degrees", [3, 47, 90, 118, 163])
def test_a_ramp_has_one_direction(degrees):
    """Brightness that grows along one direction: all of a cell's gradients are in one bin."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(48.0), indexing="ij")
    angle = math.radians(degrees)
    ramp = x * math.sin(angle) + y * math.cos(angle)
    inside = hog(ramp[None, None])[0, 0, :, 1:-1, 1:-1]  # borders are reflected
    expected = torch.zeros(9, 2, 4)
    expected[math.floor(degrees / 20)] = 1
    torch.testing.assert_close(inside, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("axis", "k"), [(1, 4), (0, 0)])
def test_ramps_along_an_axis_fill_their_bin_up_to_the_border(axis, k):
    lines = torch.arange(24.0) ** 1.5
    image = lines[None, :].expand(16, 24) if axis else lines[:, None].expand(24, 16)
    found = hog(image[None, None], window=None)[0, 0]
    assert torch.equal(found[k], torch.ones_like(found[k]))
    assert found.sum() == found[k].sum()


def test_scale_shift_and_negation_of_channels_do_not_matter():
    """Views are normalised per channel; opposite directions share a bin."""
    image = randn(2, 3, 16, 32)
    scale, shift = torch.tensor([2.0, -0.5, 7.0]), torch.tensor([1.0, -3.0, 0.25])
    moved = image * scale[:, None, None] + shift[:, None, None]
    torch.testing.assert_close(hog(moved), hog(image), atol=1e-5, rtol=0)


def test_a_flat_image_has_no_histogram():
    """Where its sums are exact; 0.7 leaves rounding, here as in a convolution."""
    assert not hog(torch.full((1, 3, 16, 16), 0.75)).any()
    rounded = torch.full((1, 3, 16, 16), 0.7)
    assert torch.equal(hog(rounded), by_convolution(rounded, 9, 8, 16))


def test_the_window_weights_the_middle():
    window = gaussian_window(16)
    assert window.sum().item() == pytest.approx(1)
    assert torch.equal(window, window.T)
    assert torch.equal(window, window.flip(0))
    assert (window[7, 7] / window[7, 15]).item() == pytest.approx(
        math.exp((7.5**2 - 0.5**2) / (2 * 8**2)), rel=1e-5
    )


def test_patches_hold_channel_bin_row_column():
    image, bins, cell, patch = randn(2, 3, 16, 24), 5, 2, 8
    cells = hog(image, bins=bins, cell=cell, window=4)
    found = hog_of_patches(image, patch, bins=bins, cell=cell, window=4)
    assert found.shape == (2, 6, 3 * 5 * 4 * 4)
    for n in range(6):
        row, column = divmod(n, 3)
        for c in range(3):
            for k in range(bins):
                for i in range(4):
                    for j in range(4):
                        number = ((c * bins + k) * 4 + i) * 4 + j
                        expected = cells[:, c, k, row * 4 + i, column * 4 + j]
                        assert torch.equal(found[:, n, number], expected)


def test_numbers_of_the_paper():
    assert hog_of_patches(randn(1, 3, 32, 48), 16).shape == (1, 6, 108)


def test_autocast_changes_nothing():
    image = randn(2, 3, 16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hog(image), hog(image.clone()))
        found = hog(image)
    assert found.dtype == torch.float32
    assert torch.equal(found, hog(image))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"cell": 5}, r"cell is 5 pixels and the image 16 x 24.*set cell at model.objectives"),
        ({"window": 16}, r"window is 16 .* 16 x 24.*or be null for equal weights; set window"),
    ],
)
def test_sizes_that_do_not_divide(sizes, message):
    with pytest.raises(UserError, match=message):
        hog(randn(1, 3, 16, 24), **sizes)
