"""Eight fillings, four grounds and their colours, all drawn as a mix of two tones.

A filling or a ground takes the coordinates of points, in periods for fillings and in image sides
for grounds, and a table of (16, 16) uniform numbers for those that are irregular; it returns how
much of the second tone each point has, in [0, 1].
"""

import math
from collections.abc import Callable

import numpy as np
from numpy import ndarray

Field = ndarray  # any shape; all of one call and the result of one shape
Table = ndarray


def _edge(wave: Field) -> Field:
    """A square wave whose flanks are wide enough not to alias at five pixels a period."""
    return np.clip(0.5 + 2.5 * wave, 0.0, 1.0)


def plain(u: Field, v: Field, table: Table) -> Field:
    """A ramp down the figure."""
    return np.clip(0.5 + 0.2 * v, 0.0, 1.0)


def rows(u: Field, v: Field, table: Table) -> Field:
    return _edge(np.sin(2 * math.pi * v))


def columns(u: Field, v: Field, table: Table) -> Field:
    return _edge(np.sin(2 * math.pi * u))


def checks(u: Field, v: Field, table: Table) -> Field:
    return _edge(2.0 * np.sin(4.4 * u) * np.sin(4.4 * v))


def dots(u: Field, v: Field, table: Table) -> Field:
    """Discs on a square lattice, a little wider than a period so that they stay round."""
    u, v = 0.8 * u, 0.8 * v
    return _edge(6.0 * (0.32 - np.hypot(u - np.rint(u), v - np.rint(v))))


def target(u: Field, v: Field, table: Table) -> Field:
    """Circles about the middle of the figure."""
    return _edge(np.sin(2 * math.pi * np.hypot(u, v)))


def bricks(u: Field, v: Field, table: Table) -> Field:
    """Bricks twice as long as high, every other row moved by half of one; joints are tone 2."""
    row = np.floor(v)
    along = 0.5 * u + 0.5 * (row % 2)
    joint = np.minimum(0.5 - np.abs(v - row - 0.5), 2 * np.abs(along - np.rint(along)))
    return _edge(5.0 * (0.13 - joint))


def mosaic(u: Field, v: Field, table: Table) -> Field:
    """Small tiles, each with a tone of its own."""
    return table[np.floor(2.2 * u).astype(np.intp) % 16, np.floor(2.2 * v).astype(np.intp) % 16]


def flat(x: Field, y: Field, table: Table) -> Field:
    """A ramp across the whole image."""
    return x


def clouds(x: Field, y: Field, table: Table) -> Field:
    """Smooth noise with bumps of a third of the image."""
    u, v = 3.0 * x + 4.0, 3.0 * y + 4.0  # clear of the table's edges
    i, j = u.astype(np.intp), v.astype(np.intp)
    p, q = u - i, v - j
    p, q = p * p * (3 - 2 * p), q * q * (3 - 2 * q)
    upper = table[i, j] * (1 - p) + table[i + 1, j] * p
    lower = table[i, j + 1] * (1 - p) + table[i + 1, j + 1] * p
    return upper * (1 - q) + lower * q


def horizon(x: Field, y: Field, table: Table) -> Field:
    """Sky and land."""
    return np.clip(0.5 + 20.0 * (y - 0.5), 0.0, 1.0)


def waves(x: Field, y: Field, table: Table) -> Field:
    """Broad soft bands, far wider than any filling's."""
    return 0.5 + 0.5 * np.sin(8.0 * x)


def oklch(lightness: ndarray, chroma: ndarray, hue: ndarray) -> ndarray:
    """The sRGB colours (n, 3), in [0, 1], of n Oklch ones; hue in turns.

    Oklab is Ottosson's (2020), the numbers those of CSS Color 4; what is out of gamut is clipped.
    """
    a, b = chroma * np.cos(2 * math.pi * hue), chroma * np.sin(2 * math.pi * hue)
    cones = np.stack([lightness, a, b], axis=1) @ _LAB_TO_CONES
    linear = np.clip(cones**3 @ _CONES_TO_LINEAR, 0.0, 1.0)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


_LAB_TO_CONES = np.array([
    [1.0, 1.0, 1.0],
    [0.3963377774, -0.1055613458, -0.0894841775],
    [0.2158037573, -0.0638541728, -1.2914855480],
])  # fmt: skip
_CONES_TO_LINEAR = np.array([
    [4.0767416621, -1.2684380046, -0.0041960863],
    [-3.3077115913, 2.6097574011, -0.7034186147],
    [0.2309699292, -0.3413193965, 1.7076147010],
])  # fmt: skip

Pattern = Callable[[Field, Field, Table], Field]
FILLINGS: dict[str, Pattern] = {
    p.__name__: p for p in (plain, rows, columns, checks, dots, target, bricks, mosaic)
}
GROUNDS: dict[str, Pattern] = {p.__name__: p for p in (flat, clouds, horizon, waves)}
