"""One picture of the procedural set: what is drawn at random, and how it is painted."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray

from contramask.data.procedural_shapes import FIGURES
from contramask.data.procedural_textures import FILLINGS, GROUNDS, oklch

SHAPES, TEXTURES, BACKGROUNDS = tuple(FIGURES), tuple(FILLINGS), tuple(GROUNDS)


class Factors(NamedTuple):
    """What an image shows, as places in SHAPES, TEXTURES and BACKGROUNDS."""

    shape: int
    texture: int
    background: int

    @property
    def label(self) -> int:
        """Both of the figure's factors in one number: shape is `// 8` of it, texture `% 8`."""
        return self.shape * len(TEXTURES) + self.texture


@dataclass(frozen=True)
class Scene:
    """Everything about an image but its factors. Lengths are in image sides, angles in radians."""

    x: float
    y: float
    radius: float
    angle: float
    period: float
    tilt: float
    phase: tuple[float, float]
    ground_angle: float
    light: tuple[float, float]
    spot: tuple[float, float, float]
    colours: Float[ndarray, "5 3"]
    table: Float[ndarray, "16 16"]


def draw(rng: np.random.Generator) -> Scene:
    """The nuisances of one image."""
    radius, turn = rng.uniform(0.35, 0.44), 2 * math.pi
    light, strength = rng.uniform(0, turn), rng.uniform(0, 0.3)
    x, y = rng.uniform(0.38, 0.62), rng.uniform(0.38, 0.62)
    away, around = radius * rng.uniform(0.8, 1.3), rng.uniform(0, turn)
    return Scene(
        x=x,
        y=y,
        radius=radius,
        angle=rng.uniform(-0.5, 0.5),
        period=rng.uniform(0.13, 0.17),
        tilt=rng.uniform(-0.15, 0.15),
        phase=(rng.random(), rng.random()),
        ground_angle=rng.uniform(-0.4, 0.4) + turn / 4 * rng.integers(2),
        light=(strength * math.cos(light), strength * math.sin(light)),
        spot=(x + away * math.cos(around), y + away * math.sin(around), rng.uniform(0.05, 0.1)),
        colours=_colours(rng),
        table=rng.random((16, 16)),
    )


def _colours(rng: np.random.Generator) -> Float[ndarray, "5 3"]:
    """Two tones of the figure, two of the ground, one of the spot.

    The figure's tones differ in lightness, so that a texture survives the loss of colour; figure
    and ground differ in hue, and the ground's lightness is free, so that neither a bright nor a
    dark figure is the rule.
    """
    tones = rng.permutation([rng.uniform(0.25, 0.55), rng.uniform(0.70, 0.95)])
    middle, step = rng.uniform(0.4, 0.8), rng.uniform(0.06, 0.15)
    hue = rng.random()
    other = hue + rng.uniform(0.25, 0.75)
    return oklch(
        np.array([*tones, middle - step, middle + step, rng.uniform(0.3, 0.9)]),
        np.array([*rng.uniform((0.08, 0.05, 0.03, 0.03), (0.18, 0.15, 0.10, 0.10)), 0.12]),
        np.array(
            [
                hue,
                hue + rng.uniform(-0.15, 0.15),
                other,
                other + rng.uniform(-0.1, 0.1),
                rng.random(),
            ]
        ),
    )


def paint(
    shown: Factors, scene: Scene, size: int, rng: np.random.Generator
) -> UInt8[ndarray, "size size 3"]:
    """The picture of a scene: ground, shadow, figure, spot, light, noise."""
    x, y = _grid(size)
    dark, bright, ground_one, ground_two, spot = scene.colours
    picture = _mix(ground_one, ground_two, _ground(shown, scene, x, y))
    figure = FIGURES[SHAPES[shown.shape]]
    away = (x - scene.x + 0.12 * scene.light[0], y - scene.y + 0.12 * scene.light[1])
    far = figure(*_turn(*away, scene.angle, scene.radius)) * scene.radius
    picture *= 1 - 0.45 * np.clip(0.5 - 12.0 * far, 0.0, 1.0)[..., None]

    fine_x, fine_y = _grid(2 * size)
    fine_x, fine_y = fine_x - scene.x, fine_y - scene.y
    distance = figure(*_turn(fine_x, fine_y, scene.angle, scene.radius)) * scene.radius
    cover = np.clip(0.5 - distance * 2 * size, 0.0, 1.0)
    u, v = _turn(fine_x, fine_y, scene.tilt, scene.period)
    tone = FILLINGS[TEXTURES[shown.texture]](u + scene.phase[0], v + scene.phase[1], scene.table)
    whole, second = _halve(cover), _halve(cover * tone)
    picture *= 1 - whole[..., None]
    picture += (whole - second)[..., None] * dark + second[..., None] * bright

    left, top, radius = scene.spot
    spotted = np.clip(0.5 + (radius - np.hypot(x - left, y - top)) * size, 0.0, 1.0)[..., None]
    picture += spotted * (spot - picture)
    picture *= (1 + scene.light[0] * (x - 0.5) + scene.light[1] * (y - 0.5))[..., None]
    picture += 0.02 * rng.standard_normal(picture.shape)
    return np.rint(np.clip(picture, 0.0, 1.0) * 255).astype(np.uint8)


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[ndarray, ndarray]:
    """The centres of size x size pixels, in image sides."""
    line = (np.arange(size) + 0.5) / size
    y, x = np.meshgrid(line, line, indexing="ij")
    return x, y


def _turn(x: ndarray, y: ndarray, angle: float, scale: float) -> tuple[ndarray, ndarray]:
    """Coordinates in axes turned by `angle`, in units of `scale`."""
    c, s = math.cos(angle) / scale, math.sin(angle) / scale
    return c * x + s * y, c * y - s * x


def _ground(shown: Factors, scene: Scene, x: ndarray, y: ndarray) -> ndarray:
    x, y = _turn(x - 0.5, y - 0.5, scene.ground_angle, 1.0)
    return GROUNDS[BACKGROUNDS[shown.background]](x + 0.5, y + 0.5, scene.table)


def _mix(one: ndarray, two: ndarray, share: ndarray) -> ndarray:
    return one + share[..., None] * (two - one)


def _halve(fine: ndarray) -> ndarray:
    """Means of 2 x 2 points."""
    return 0.25 * (fine[::2, ::2] + fine[1::2, ::2] + fine[::2, 1::2] + fine[1::2, 1::2])
