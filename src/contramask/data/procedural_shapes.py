"""Eight flat figures as signed distances: negative inside, in units of the figure's radius.

Each function takes the coordinates (x to the right, y downwards) of any number of points, in units
of the figure's radius about its centre, and returns the signed distance to the outline. Distances
are exact near the outline, which is where anti-aliasing reads them; far away some are lower bounds.
The sizes are chosen so that areas lie close together: brightness alone tells no shape.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy import ndarray

Field = ndarray  # any shape; x, y and the result of one shape


def disc(x: Field, y: Field) -> Field:
    return np.hypot(x, y) - 0.77


def square(x: Field, y: Field) -> Field:
    return np.maximum(np.abs(x), np.abs(y)) - 0.68


def triangle(x: Field, y: Field) -> Field:
    """Equilateral, one tip up: the largest of the distances to its three sides."""
    slanted = 0.5 * math.sqrt(3) * np.abs(x) - 0.5 * y
    return np.maximum(slanted, y) - 0.59


def star(x: Field, y: Field) -> Field:
    """Five points: the plane is folded into one tenth, where the outline is a line."""
    sector = math.pi / 5
    angle = np.arctan2(x, -y)  # from the upper tip
    angle = np.abs((angle + sector) % (2 * sector) - sector)
    radius = np.hypot(x, y)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    tip, notch = 1.1, 0.55
    edge_x, edge_y = notch * math.cos(sector) - tip, notch * math.sin(sector)
    return (edge_y * (along - tip) - edge_x * across) / math.hypot(edge_x, edge_y)


def cross(x: Field, y: Field) -> Field:
    """Two bars at right angles."""
    long, wide = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    return np.maximum(long - 0.92, wide - 0.31)


def ring(x: Field, y: Field) -> Field:
    return np.abs(np.hypot(x, y) - 0.7) - 0.22


def crescent(x: Field, y: Field) -> Field:
    """A disc that another disc has bitten."""
    x = x - 0.2
    return np.maximum(np.hypot(x, y) - 0.98, 0.68 - np.hypot(x - 0.52, y))


def heart(x: Field, y: Field) -> Field:
    """A square on its corner and two discs on its upper sides."""
    x, y, side = np.abs(x), y - 0.16, 0.515
    corner = np.maximum(np.abs(x + y), np.abs(x - y)) / math.sqrt(2) - side
    lobe = np.hypot(x - side / math.sqrt(2), y + side / math.sqrt(2)) - side
    return np.minimum(corner, lobe)


FIGURES: dict[str, Callable[[Field, Field], Field]] = {
    figure.__name__: figure
    for figure in (disc, square, triangle, star, cross, ring, crescent, heart)
}
