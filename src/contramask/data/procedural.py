"""A small world of coloured objects in which shape, texture and background are independent.

Every block of 64 consecutive images holds each (shape, texture) once and every shape and texture
equally often on each background; every 256 images hold each triple once. So neither factor tells
anything of another, exactly, and an encoder's reading of one is not a reading of the other. What
else varies (colours, place, size, angle, light, an occluding spot, noise) is drawn per image.

Image i of a split is a function of (seed, split, i) alone.
"""

import json
from pathlib import Path
from typing import Literal

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from numpy import ndarray

from contramask.data.pack import ShardWriter, write_classes
from contramask.data.procedural_scene import (
    BACKGROUNDS,
    SHAPES,
    TEXTURES,
    Factors,
    draw,
    paint,
)
from contramask.errors import UserError
from contramask.types import fold

BLOCK = len(SHAPES) * len(TEXTURES)

Split = Literal["train", "val"]


def factors(seed: int, split: Split, index: int) -> Factors:
    """The factors of image `index`: a shuffled factorial design.

    Within a run of 4 blocks the backgrounds form a Latin square over shuffled shapes and textures,
    one step further with each block.
    """
    block, place = divmod(index, BLOCK)
    run, turn = divmod(block, len(BACKGROUNDS))
    square = np.random.default_rng(fold(seed, "procedural", split, "run", run))
    row, column = square.permutation(len(SHAPES)), square.permutation(len(TEXTURES))
    order = np.random.default_rng(fold(seed, "procedural", split, "block", block))
    shape, texture = divmod(int(order.permutation(BLOCK)[place]), len(TEXTURES))
    return Factors(shape, texture, int(row[shape] + column[texture] + turn) % len(BACKGROUNDS))


def render(*, seed: int, split: Split, index: int, size: int) -> UInt8[ndarray, "size size 3"]:
    """Image `index` of a split, RGB, `size` pixels square."""
    rng = np.random.default_rng(fold(seed, "procedural", split, "image", index))
    return paint(factors(seed, split, index), draw(rng), size, rng)


def write_shards(
    folder: str | Path,
    *,
    images: int = 8192,
    val_images: int = 2048,
    seed: int = 0,
    size: int = 32,
    shards: int = 4,
) -> dict[str, str]:
    """Writes both splits and their index to `folder`; returns the patterns that name the shards.

    A sample is `KEY.jpg`, `KEY.cls` (see `Factors.label`) and `KEY.json` with the factors by name.
    The training images are spread over `shards` tars, the others are in one. What was there under
    these names is replaced. The bytes are a function of the arguments.

    Raises `UserError` where the factors would not be balanced or a figure not be told.
    """
    for name, count in (("images", images), ("val_images", val_images)):
        if count < BLOCK or count % BLOCK:
            raise UserError(
                f"procedural images: {name} is {count}; shape and texture are balanced over every "
                f"{BLOCK} images, so it must be a multiple of {BLOCK}"
            )
    if size < 24:
        raise UserError(f"procedural images: size is {size}; below 24 pixels textures are lost")
    folder = Path(folder)
    train = _write(folder / "train", "train", images, shards, seed, size)
    val = _write(folder / "val", "val", val_images, 1, seed, size)
    write_classes(folder, classes())
    return {"train": train, "val": val}


def classes() -> list[str]:
    """The name of each label, e.g. "star with dots"."""
    return [f"{shape} with {texture}" for shape in SHAPES for texture in TEXTURES]


def _members(seed: int, split: Split, index: int, size: int) -> dict[str, bytes]:
    picture = render(seed=seed, split=split, index=index, size=size)
    shown = factors(seed, split, index)
    return {
        "jpg": simplejpeg.encode_jpeg(picture, quality=95, colorsubsampling="444", fastdct=False),
        "cls": str(shown.label).encode(),
        "json": json.dumps(shown._asdict()).encode(),
    }


def _write(prefix: Path, split: Split, images: int, shards: int, seed: int, size: int) -> str:
    """Writes one split; returns its pattern."""
    with ShardWriter(prefix, max_count=-(-images // shards), overwrite=True) as writer:
        for index in range(images):
            writer.add(f"{split}{index:06d}", _members(seed, split, index, size))
        written = writer.finish()
    return f"{prefix}-{{000000..{len(written) - 1:06d}}}.tar"
