"""One image on disk -> the members of a sample. Runs in the processes of `contramask pack`.

JPEG, PNG and WebP are copied byte for byte unless a size or a quality is asked for; other formats
become PNG. Nothing here imports torch, so that these processes start fast and stay small.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from contramask.data.decode import BadImage, open_picture

_MAGIC = {"jpg": (0, b"\xff\xd8\xff"), "png": (0, b"\x89PNG\r\n\x1a\n"), "webp": (8, b"WEBP")}
_QUALITY = 95  # of JPEGs that are written again for another size

# Binary layouts: bytes before the pixels of a record, then 3 x side x side bytes.
LAYOUTS = {"cifar10": (1, 32), "cifar100": (2, 32), "stl10": (0, 96)}
Layout = Literal["cifar10", "cifar100", "stl10"]


@dataclass(frozen=True)
class Original:
    """An image to pack: a file, or a record of a binary file."""

    path: str
    label: int | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)  # become the sample's .json
    mask: str | None = None  # a PNG
    layout: Layout | None = None
    record: int = 0


@dataclass(frozen=True)
class Encoding:
    """What is done to images on the way.

    Attributes:
        resize: the shorter side is brought down to so many pixels; None: no image is changed.
        quality: JPEG quality; every image becomes a JPEG. None: 95 for resized JPEGs, and no other
            image becomes one.
        verify: decode every image, so that a damaged one is found now.
    """

    resize: int | None = None
    quality: int | None = None
    verify: bool = True


def read_many(originals: Sequence[Original], encoding: Encoding) -> list[dict[str, bytes] | str]:
    """The members of each image, or what is wrong with it."""
    return [read(original, encoding) for original in originals]


def read(original: Original, encoding: Encoding) -> dict[str, bytes] | str:
    """The members of one image, image first; a line that says why it is left out."""
    try:
        suffix, data = _image(original, encoding)
        mask = None if original.mask is None else _mask(original.mask, encoding)
    except OSError as error:
        return f"unreadable ({error.strerror or error})"
    except BadImage as error:
        return str(error)
    members = {suffix: data}
    if original.label is not None:
        members["cls"] = str(original.label).encode()
    if original.notes:
        text = json.dumps(original.notes, ensure_ascii=False, sort_keys=True)
        members["json"] = text.encode()
    if mask is not None:
        members["seg.png"] = mask
    return members


def kind(data: bytes) -> str | None:
    """The suffix of an encoded image that is packed as it is, by its first bytes."""
    for suffix, (at, magic) in _MAGIC.items():
        if data[at : at + len(magic)] == magic:
            return suffix
    return None


def _image(original: Original, encoding: Encoding) -> tuple[str, bytes]:
    if original.layout is not None:
        return _encoded(_record(original), "png", encoding)
    with open(original.path, "rb") as file:
        data = file.read()
    suffix = kind(data)
    if suffix is not None and encoding.quality is None and not _too_large(data, encoding):
        if encoding.verify:
            open_picture(data).pixels(reduce=8)  # reads every byte, and decodes a JPEG small
        return suffix, data
    return _encoded(open_picture(data).pixels(), suffix or "png", encoding)


def _too_large(data: bytes, encoding: Encoding) -> bool:
    if encoding.resize is None:
        return False
    picture = open_picture(data)
    return min(picture.height, picture.width) > encoding.resize


def _encoded(pixels: np.ndarray, suffix: str, encoding: Encoding) -> tuple[str, bytes]:
    """RGB pixels, made smaller if asked, as JPEG or PNG."""
    height, width = pixels.shape[:2]
    if encoding.resize is not None and min(height, width) > encoding.resize:
        scale = encoding.resize / min(height, width)
        size = (round(width * scale), round(height * scale))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    if encoding.quality is not None or suffix == "jpg":
        pixels = np.ascontiguousarray(pixels)
        return "jpg", simplejpeg.encode_jpeg(pixels, quality=encoding.quality or _QUALITY)
    _, png = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    return "png", png.tobytes()


def _record(original: Original) -> np.ndarray:
    """Upright RGB pixels of one record. Raises `BadImage` where the file is too short."""
    assert original.layout is not None
    skip, side = LAYOUTS[original.layout]
    size = skip + 3 * side * side
    with open(original.path, "rb") as file:
        file.seek(original.record * size)
        data = file.read(size)
    if len(data) < size:
        raise BadImage("truncated", f"record {original.record} of {original.path}")
    planes = np.frombuffer(data, np.uint8, offset=skip).reshape(3, side, side)
    # CIFAR keeps rows, STL columns.
    return np.ascontiguousarray(planes.transpose((2, 1, 0) if skip == 0 else (1, 2, 0)))


def _mask(path: str, encoding: Encoding) -> bytes:
    with open(path, "rb") as file:
        data = file.read()
    if kind(data) != "png":
        raise BadImage("not an image", f"mask {path} is not a PNG")
    if encoding.resize is None:
        return data
    # As the image is made smaller; Pillow keeps the numbers of a palette, nearest invents none.
    with Image.open(io.BytesIO(data)) as mask:
        width, height = mask.size
        if min(width, height) <= encoding.resize:
            return data
        scale = encoding.resize / min(width, height)
        small = mask.resize((round(width * scale), round(height * scale)), Image.Resampling.NEAREST)
    out = io.BytesIO()
    small.save(out, "PNG")
    return out.getvalue()
