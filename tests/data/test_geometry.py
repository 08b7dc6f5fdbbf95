"""Crop boxes and resizing, held to torchvision's on Pillow images."""

import math
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from contramask.data import geometry
from contramask.data.crops import uniforms
from contramask.data.decode import decode
from contramask.data.geometry import Box

RATIO = (3 / 4, 4 / 3)
MODES = {
    "bilinear": v2.InterpolationMode.BILINEAR,
    "bicubic": v2.InterpolationMode.BICUBIC,
}


def boxes(
    count: int,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """Drawn boxes, (count, 5): top, left, height, width, mirrored."""
    draws = (uniforms(n, "boxes", count=geometry.UNIFORMS) for n in range(count))
    return np.array(
        [geometry.draw_box(u, height, width, scale=scale, ratio=ratio, flip=0.3) for u in draws]
    )


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The Kolmogorov-Smirnov distance of two samples."""
    grid = np.sort(np.concatenate([a, b]))
    cumulative = [np.searchsorted(np.sort(x), grid, side="right") / len(x) for x in (a, b)]
    return float(np.abs(cumulative[0] - cumulative[1]).max())


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (375, 500, (0.08, 1.0), RATIO),
        (500, 333, (0.67, 1.0), RATIO),
        (32, 32, (0.2, 1.0), RATIO),
        (60, 400, (0.05, 0.4), (0.5, 0.9)),
    ],
)
def test_boxes_are_distributed_as_torchvisions(height, width, scale, ratio):
    count = 5000
    ours = boxes(count, height, width, scale, ratio)
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    params = v2.RandomResizedCrop(7, scale=scale, ratio=ratio)
    theirs = [params.make_params([image]) for _ in range(count)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in theirs])
    assert ours[:, 4].mean() == pytest.approx(0.3, abs=0.02)
    for name, measure in {
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "area": lambda b: b[:, 2] * b[:, 3],
        "shape": lambda b: b[:, 3] / b[:, 2],
    }.items():
        # Two equal distributions are this far apart once in ten thousand times.
        assert distance(measure(ours), measure(theirs)) < 0.045, name


@given(
    n=st.integers(0, 10**6),
    height=st.integers(1, 700),
    width=st.integers(1, 700),
    low=st.floats(0.001, 1.0),
)
@example(n=10372, height=1, width=4, low=0.25)  # at the edge, and rounded to a place behind it
def test_boxes_lie_inside_the_image(n, height, width, low):
    u = uniforms(n, count=geometry.UNIFORMS)
    box = geometry.draw_box(u, height, width, scale=(low, 1.0), ratio=RATIO, flip=0.5)
    assert box.height >= 1
    assert box.width >= 1
    assert 0 <= box.top <= height - box.height
    assert 0 <= box.left <= width - box.width
    for factor in (2, 4, 8):
        size = (math.ceil(height / factor), math.ceil(width / factor))
        small = geometry.shrunk(box, factor, *size)
        assert small.height >= 1
        assert small.width >= 1
        assert 0 <= small.top <= size[0] - small.height
        assert 0 <= small.left <= size[1] - small.width


@pytest.mark.parametrize(("height", "width"), [(9, 900), (900, 9)])
def test_a_strip_gives_its_centre(height, width):
    u = uniforms(1, count=geometry.UNIFORMS)
    box = geometry.draw_box(u, height, width, scale=(0.5, 1.0), ratio=RATIO, flip=0.0)
    assert (box.height, box.width) == ((9, 12) if height == 9 else (12, 9))
    assert (box.top, box.left) == ((900 - 12) // 2 * (width == 9), (900 - 12) // 2 * (height == 9))


def texture(height: int, width: int) -> np.ndarray:
    """Noise with a little smoothness: as hard for a resize as pictures get."""
    noise = np.random.default_rng(5).normal(128, 60, (height, width, 3))
    noise = (noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1)) / 2
    return np.clip(noise - 64, 0, 255).astype(np.uint8)


BOXES = [Box(3, 5, 90, 110), Box(0, 0, 113, 147), Box(40, 50, 21, 17), Box(10, 90, 100, 23)]


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("box", BOXES)
def test_a_cut_is_torchvisions_on_pillow(box, mode):
    image = texture(113, 147)
    ours = geometry.cut(image, box, size=29, interpolation=mode)
    theirs = np.asarray(
        tv.resized_crop(Image.fromarray(image), *box[:4], [29, 29], MODES[mode], antialias=True)
    )
    assert np.abs(ours.astype(int) - theirs).mean() < 0.3
    mirrored = geometry.cut(image, box._replace(flip=True), size=29, interpolation=mode)
    assert np.array_equal(mirrored, ours[:, ::-1])


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_cuts_of_photographs_are_torchvisions_on_pillow(shared_data, mode):
    apart = []
    for n, image in enumerate(photographs(shared_data("imagenet-sample"), 12)):
        u = uniforms(n, count=geometry.UNIFORMS)
        box = geometry.draw_box(u, *image.shape[:2], scale=(0.08, 1.0), ratio=RATIO, flip=0.0)
        ours = geometry.cut(image, box, size=96, interpolation=mode)
        theirs = tv.resized_crop(Image.fromarray(image), *box[:4], [96, 96], MODES[mode])
        apart.append(np.abs(ours.astype(int) - np.asarray(theirs)).mean())
    assert np.mean(apart) < 0.1


def photographs(folder: Path, count: int) -> Iterator[np.ndarray]:
    with tarfile.open(folder / "train-000000.tar") as members:
        names = [m for m in members if m.name.endswith(".jpg")][:count]
        for member in names:
            stream = members.extractfile(member)
            assert stream is not None
            yield decode(stream.read())


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_shrinking_does_not_alias(mode):
    board = np.indices((120, 150)).sum(0) % 2 * 255
    image = np.repeat(board[..., None], 3, 2).astype(np.uint8)
    small = geometry.cut(image, Box(0, 0, 120, 150), size=40, interpolation=mode)
    assert small[2:-2, 2:-2].std() < 2  # taking every third pixel would give 127


def test_the_kernel_called_directly_is_interpolates():
    image = texture(51, 67)
    for mode in MODES:
        channels = torch.from_numpy(image).permute(2, 0, 1)[None]
        expected = torch.nn.functional.interpolate(
            channels, size=(31, 44), mode=mode, antialias=True
        )
        ours = torch.from_numpy(geometry.resize(image, 31, 44, mode)).permute(2, 0, 1)
        assert torch.equal(ours, expected[0])
