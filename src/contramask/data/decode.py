"""Bytes to upright RGB pixels, or a `BadImage` that says why not.

JPEG goes through libjpeg-turbo, at 1/2, 1/4 or 1/8 of its size where that is all a view needs;
everything else, and JPEGs of rare kinds (CMYK, YCCK, arithmetic coding), goes through Pillow.
What is done with odd images: the EXIF orientation is applied; transparency is laid over white, as
a browser shows it; 16-bit pictures keep their high byte; animations give their first frame; colour
profiles are ignored. A damaged image is refused and never half used.
"""

import io
import struct
import threading
import warnings
from abc import ABC, abstractmethod
from typing import Literal

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from contramask.data import jpeg_header
from contramask.data.jpeg_header import JpegHeader

MAX_PIXELS = 100_000_000  # refused by the header; 300 MB when decoded
MIN_SIDE = 2  # a line of one pixel has no second dimension to crop
_LENT = 3 * 4096 * 4096  # bytes of the largest picture decoded into memory that is kept
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

Pixels = UInt8[np.ndarray, "H W 3"]
Reason = Literal["corrupt", "truncated", "too large", "too small", "not an image"]

# What Pillow's readers are known to raise on damaged files, besides OSError.
_DAMAGE = (OSError, ValueError, SyntaxError, EOFError, struct.error)


class BadImage(ValueError):
    """An image that cannot be used. `reason` is one of few fixed words, to count by."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason: Reason = reason


class Picture(ABC):
    """An image whose header has been read and whose pixels have not."""

    height: int  # upright, in pixels
    width: int

    @abstractmethod
    def pixels(self, *, reduce: int = 1, lent: bool = False) -> Pixels:
        """The upright image. `reduce` in (1, 2, 4, 8) allows it to be that many times smaller.

        The result has either the full size or ceil(height / reduce), ceil(width / reduce). Where
        it may be `lent`, the thread's next decoding may overwrite it: fresh memory for every image
        costs a sixth of the time a JPEG takes. Raises `BadImage` when the file is damaged.
        """


def open_picture(data: bytes, *, max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE) -> Picture:
    """Reads the header; raises `BadImage` before decoding what is too large, small or no image."""
    header = jpeg_header.read(data) if data[:2] == b"\xff\xd8" else None
    picture: Picture
    if header is not None and header.components in (1, 3) and header.bits == 8:
        picture = _Jpeg(data, header)
    else:
        picture = _Other(data)
    size = f"{picture.width} x {picture.height} pixels"
    if picture.height * picture.width > max_pixels:
        raise BadImage("too large", f"{size}, allowed {max_pixels}")
    if min(picture.height, picture.width) < min_side:
        raise BadImage("too small", size)
    return picture


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE) -> Pixels:
    """Upright RGB pixels of a JPEG, PNG, WebP, GIF or BMP file."""
    return open_picture(data, max_pixels=max_pixels, min_side=min_side).pixels()


class _Jpeg(Picture):
    def __init__(self, data: bytes, header: JpegHeader) -> None:
        self.data = data
        self.header = header
        turned = header.orientation >= 5
        self.height, self.width = (
            (header.width, header.height) if turned else (header.height, header.width)
        )

    def pixels(self, *, reduce: int = 1, lent: bool = False) -> Pixels:
        buffer = None
        if lent:
            buffer = _scratch(3 * -(-self.height // reduce) * -(-self.width // reduce))
        try:
            stored = self._decode(self.data, reduce, buffer=buffer)
        except ValueError as error:
            stored = self._again(str(error), reduce)
        return upright(stored, self.header.orientation)

    def _decode(
        self, data: bytes, reduce: int, *, strict: bool = True, buffer: np.ndarray | None = None
    ) -> Pixels:
        height = width = 0  # 0: the full size
        if reduce > 1:
            height, width = -(-self.header.height // reduce), -(-self.header.width // reduce)
        return simplejpeg.decode_jpeg(
            data, min_height=height, min_width=width, strict=strict, buffer=buffer
        )

    def _again(self, message: str, reduce: int) -> Pixels:
        """After a complaint of libjpeg: some are harmless, and some files only lack their end."""
        data = self.data
        if message.startswith("Premature end"):
            # Whole but for its last marker, or cut? With the marker a whole image has no complaint.
            data = data + b"\xff\xd9"
        elif message.startswith("Corrupt JPEG data"):
            raise BadImage("truncated" if "premature end" in message else "corrupt", message)
        else:
            try:
                return self._decode(data, reduce, strict=False)
            except ValueError:
                return _Other(data).stored()
        try:
            return self._decode(data, reduce)
        except ValueError:
            raise BadImage("truncated", message) from None


class _Other(Picture):
    def __init__(self, data: bytes) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.image = Image.open(io.BytesIO(data), formats=FORMATS)
                self.orientation = self.image.getexif().get(0x0112, 1)
        except Image.DecompressionBombError as error:
            raise BadImage("too large", str(error)) from None
        except UnidentifiedImageError:
            raise BadImage("not an image", f"{len(data)} bytes, none of {FORMATS}") from None
        except _DAMAGE as error:
            raise BadImage("corrupt", f"{type(error).__name__}: {error}") from None
        if self.orientation not in range(1, 9):
            self.orientation = 1
        width, height = self.image.size
        turned = self.orientation >= 5
        self.height, self.width = (width, height) if turned else (height, width)

    def pixels(self, *, reduce: int = 1, lent: bool = False) -> Pixels:
        return upright(self.stored(), self.orientation)

    def stored(self) -> Pixels:
        """The pixels before the orientation."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _rgb(self.image)
        except _DAMAGE as error:
            reason = "truncated" if "truncated" in str(error) else "corrupt"
            raise BadImage(reason, f"{type(error).__name__}: {error}") from None


_memory = threading.local()


def _scratch(size: int) -> UInt8[np.ndarray, " n"] | None:
    """The thread's buffer for decoding; None for an image that is too large to keep one for."""
    if size > _LENT:
        return None
    buffer = getattr(_memory, "buffer", None)
    if buffer is None or buffer.size < size:
        buffer = _memory.buffer = np.empty(max(size, 1 << 20), np.uint8)
    return buffer


def _rgb(image: Image.Image) -> Pixels:
    """RGB of any mode of Pillow."""
    if image.mode.startswith("I"):
        return np.repeat(_high_byte(np.asarray(image))[..., None], 3, axis=2)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))  # a copy: torch wants it writable


def _high_byte(grey: np.ndarray) -> UInt8[np.ndarray, "H W"]:
    """8 bits of a 16-bit picture, whatever type its numbers travel in."""
    return (np.clip(grey, 0, 65535).astype(np.int32) >> 8).astype(np.uint8)


def upright(image: Pixels, orientation: int) -> UInt8[np.ndarray, "h w 3"]:
    """Undoes the EXIF orientation (1 to 8; JEITA CP-3451, tag 0x0112)."""
    if orientation == 1:
        return image
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)
