"""Patches in their order, and positions on the grid."""

import math

import pytest
import torch

from contramask.functional.patches import blacken, patchify, sincos, unpatchify
from contramask.types import UserError
from tests.builders import randn


def test_patchify_against_a_loop():
    image, p = randn(2, 3, 8, 20), 4  # a grid of 2 x 5
    found = patchify(image, p)
    assert found.shape == (2, 10, 48)
    for n in range(10):
        row, column = divmod(n, 5)
        for i in range(p):
            for j in range(p):
                for c in range(3):
                    expected = image[:, c, row * p + i, column * p + j]
                    assert torch.equal(found[:, n, (i * p + j) * 3 + c], expected)


@pytest.mark.parametrize("grid", [(2, 5), (5, 2), (1, 1)])
def test_unpatchify_is_the_inverse(grid):
    image = randn(2, 3, grid[0] * 4, grid[1] * 4)
    assert torch.equal(unpatchify(patchify(image, 4), 4, grid), image)


@pytest.mark.parametrize("rows_first", [False, True])
def test_sincos_in_closed_form(rows_first):
    rows, columns, d = 4, 5, 12
    table = sincos(d, (rows, columns), rows_first=rows_first)
    assert table.shape == (20, 12)
    for row in range(rows):
        for column in range(columns):
            found = table[row * columns + column].tolist()
            first, second = (row, column) if rows_first else (column, row)
            for i in range(3):
                omega = 10000 ** (-i / 3)
                expected = [f(x * omega) for x in (first, second) for f in (math.sin, math.cos)]
                assert found[i::3] == pytest.approx(expected, abs=1e-7)


def test_the_two_orders_are_transposes():
    a = sincos(12, (4, 5)).unflatten(0, (4, 5))
    b = sincos(12, (5, 4), rows_first=True).unflatten(0, (5, 4))
    assert torch.equal(a, b.transpose(0, 1))


def test_width_must_be_divisible_by_four():
    with pytest.raises(UserError, match=r"divisible by 4, given 14; set the width"):
        sincos(14, (4, 5))


def test_hidden_patches_are_black():
    image, hidden = randn(2, 3, 8, 12), torch.arange(12).reshape(2, 6) % 3 == 0
    found = blacken(image, hidden, 4)
    for b in range(2):
        for n in range(6):
            row, column = 4 * (n // 3), 4 * (n % 3)
            patch = found[b, :, row : row + 4, column : column + 4]
            whole = image[b, :, row : row + 4, column : column + 4]
            assert torch.equal(patch, torch.zeros_like(whole) if hidden[b, n] else whole)
