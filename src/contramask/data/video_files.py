"""Frames and masks of videos: sizes, reading ahead, palette PNGs."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from contramask.data.decode import BadImage, decode
from contramask.types import UserError

# What Pillow raises on damaged files and on headers that promise more pixels than it would decode.
DAMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
VOID = 255  # a pixel that belongs to nothing; the official evaluation counts it as background


def frame_size(
    size: tuple[int, int],
    *,
    patch: int,
    short_side: int = 480,
    long_side: int | None = None,
) -> tuple[int, int]:
    """(height, width) that frames are resized to, both whole numbers of patches.

    Rounded down; the long side to a multiple of 64 pixels, as DINO's evaluation does it, if that is
    a multiple of the patch and the short side 480 or more: of smaller frames it would cut much.

    Args:
        size: of the video.
        patch: side of a patch.
        short_side: in pixels.
        long_side: in pixels; None: so that the shape stays.

    Raises:
        UserError: a side is shorter than a patch.
    """
    short, long = min(size), max(size)
    official = long_side is None and short_side >= 480 and 64 % patch == 0
    step = 64 if official else patch
    wanted = short_side * long // short if long_side is None else long_side
    low, high = short_side // patch * patch, wanted // step * step
    if min(low, high) < patch:
        raise UserError(
            f"videos: frames of {short_side} x {wanted} pixels are less than a patch of {patch}; "
            f"set --short_side to {patch} or more"
        )
    return (low, high) if size[0] <= size[1] else (high, low)


def read_frames(
    paths: Sequence[Path],
    size: tuple[int, int],
    *,
    stored: tuple[int, int],
    workers: int = 2,
) -> Iterator[UInt8[Tensor, "3 H W"]]:
    """The frames in order, resized to (height, width), read ahead by threads.

    Bilinear, as in DINO's evaluation; by area where a frame shrinks to less than half.

    Args:
        paths: of the files.
        size: wanted.
        stored: what the files must have.
        workers: threads; at most 2 * workers + 1 frames are held.

    Raises:
        UserError: a frame is damaged or has another size.
    """
    waiting: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for path in paths:
            waiting.append(pool.submit(_frame, path, stored, size))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def read_mask(path: Path, expected: tuple[int, int] | None = None) -> UInt8[Tensor, "H W"]:
    """The index of the object at each pixel; void is background.

    Args:
        path: of the file.
        expected: (height, width) that its header must say before it is decoded; None: any.

    Raises:
        UserError: it is damaged, has another size, or colours in place of indices.
    """
    try:
        with Image.open(path) as image:
            _check_mask(path, image, expected)
            pixels = np.array(image)
    except UserError:  # a ValueError too
        raise
    except DAMAGE as error:
        raise UserError(f"videos: {path} cannot be read ({error}); copy it again") from error
    pixels = pixels.astype(np.uint8)
    pixels[pixels == VOID] = 0
    return torch.from_numpy(pixels)


def write_mask(path: Path, mask: UInt8[Tensor, "H W"]) -> None:
    """A palette PNG in DAVIS's colours. Raises `UserError` if it cannot be written."""
    image = Image.fromarray(mask.cpu().numpy())
    image.putpalette(palette().flatten().tolist())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, format="PNG")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); set --out to a folder that can"
        ) from error


def palette() -> UInt8[np.ndarray, "256 3"]:
    """The colours of PASCAL VOC, which DAVIS uses: bits of the index, the lowest to the highest.

    Bits 0, 1, 2 of the index are the highest bits of red, green, blue; bits 3, 4, 5 the next.
    """
    index = np.arange(256)
    colours = np.zeros((256, 3), int)
    for bit in range(8):
        channel, place = bit % 3, 7 - bit // 3
        colours[:, channel] |= (index >> bit & 1) << place
    return colours.astype(np.uint8)


def _check_mask(path: Path, image: Image.Image, expected: tuple[int, int] | None) -> None:
    """By the header alone."""
    found = (image.height, image.width)
    if expected is not None and found != expected:
        raise UserError(other_size(path, found, expected))
    if image.mode not in ("P", "L", "1"):
        raise UserError(
            f"videos: {path} is a mask of mode {image.mode}; allowed is a palette PNG, whose "
            "pixels are indices of objects; convert it"
        )


def _frame(path: Path, expected: tuple[int, int], size: tuple[int, int]) -> Tensor:
    try:
        pixels = decode(path.read_bytes(), min_side=1)
    except (OSError, BadImage) as error:
        raise UserError(f"videos: {path} cannot be read ({error}); copy it again") from error
    if pixels.shape[:2] != expected:
        raise UserError(other_size(path, pixels.shape[:2], expected))
    if pixels.shape[:2] != size:
        far = 2 * min(size) < min(expected)
        way = cv2.INTER_AREA if far else cv2.INTER_LINEAR
        pixels = cv2.resize(pixels, size[::-1], interpolation=way)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def size_of(path: Path) -> tuple[int, int]:
    """(height, width) as the header says. Raises `UserError` if it is no image."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except DAMAGE as error:
        raise UserError(f"videos: {path} cannot be read ({error}); copy it again") from error


def other_size(path: Path, found: tuple[int, ...], expected: tuple[int, int]) -> str:
    """The mistake of a file of another size."""
    return (
        f"videos: {path} has {found[0]} x {found[1]} pixels, the first frame of its video "
        f"{expected[0]} x {expected[1]}; all frames and masks of a video need one size"
    )
