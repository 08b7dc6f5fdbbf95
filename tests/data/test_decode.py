"""Odd and damaged images: upright RGB pixels, or a `BadImage` with a fixed reason."""

import io
import struct
import threading
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from contramask.data import decode as decoding
from contramask.data.decode import BadImage, decode, open_picture

H, W = 37, 53


def scene(channels: int = 3) -> np.ndarray:
    """Smooth and without symmetry, (H, W, channels)."""
    y, x = np.mgrid[:H, :W] / 8
    waves = [np.sin(x + k) * np.cos(y * (k + 1) / 3) + x / 6 for k in range(channels)]
    return np.clip(np.stack(waves, -1) * 70 + 90, 0, 255).astype(np.uint8)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


RGB = Image.fromarray(scene())
RGBA = Image.fromarray(scene(4))
FRAMES = [RGB, RGB.rotate(90), RGB.rotate(180)]


def far(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(float) - b).mean())


def reason(data: bytes, **limits: int) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data, **limits)
    assert str(caught.value).startswith(caught.value.reason)
    return caught.value.reason


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_lossless_files_give_their_pixels(kind):
    data = encode(RGB, kind, **({"lossless": True} if kind == "WEBP" else {}))
    pixels = decode(data)
    assert np.array_equal(pixels, scene())
    assert pixels.flags.writeable


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 2}])
def test_jpegs_are_what_pillow_reads(options):
    data = encode(RGB, "JPEG", **options)
    assert far(decode(data), np.asarray(Image.open(io.BytesIO(data)))) < 0.5


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_exif_orientation_is_undone(kind, orientation):
    exif = Image.Exif()
    exif[0x010F] = "a maker before the orientation"
    exif[0x0112] = orientation
    data = encode(RGB, kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    picture = open_picture(data)
    assert (picture.height, picture.width) == expected.shape[:2]
    assert far(picture.pixels(), expected) < 0.5


def test_a_big_endian_orientation_is_read():
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0" + b"MM\0*" + struct.pack(">IH", 8, 1) + entry + struct.pack(">I", 0)
    data = encode(RGB, "JPEG", exif=exif)
    assert decode(data).shape == (W, H, 3)


@pytest.mark.parametrize(
    "exif", [b"", b"II*\0", b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff"]
)
def test_damaged_exif_is_no_reason_to_turn_or_refuse(exif):
    assert decode(encode(RGB, "JPEG", exif=b"Exif\0\0" + exif)).shape == (H, W, 3)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA", "PA", "RGBA", "I;16"])
def test_every_mode_becomes_rgb(mode):
    if mode == "I;16":
        wide = scene()[..., 0].astype(np.uint16) * 256 + 77
        data, expected = encode(Image.fromarray(wide), "PNG"), np.repeat(scene()[..., :1], 3, 2)
    elif mode == "CMYK":
        data = encode(RGB.convert("CMYK"), "JPEG")
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert far(expected, scene()) < 5
    elif mode in ("LA", "PA", "RGBA"):
        data = encode(RGBA.convert("LA") if mode == "LA" else RGBA, "PNG")
        shown = np.asarray(RGBA.convert("LA").convert("RGBA") if mode == "LA" else RGBA) / 255
        expected = (shown[..., :3] * shown[..., 3:] + 1 - shown[..., 3:]) * 255
    else:
        data = encode(RGB.convert(mode), "PNG")
        expected = np.asarray(RGB.convert(mode).convert("RGB"))
    assert far(decode(data), expected) < 0.6


def test_a_ycck_jpeg_becomes_rgb():
    inverted = 255 - np.asarray(RGB.convert("CMYK"))  # as Adobe's files have it
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(inverted), quality=95, colorspace="CMYK")
    assert open_picture(data).pixels().shape == (H, W, 3)
    assert far(decode(data), scene()) < 3


def test_a_palette_with_a_transparent_colour_is_laid_over_white():
    palette = Image.new("P", (W, H), 1)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.paste(0, (0, 0, 20, H))
    pixels = decode(encode(palette, "PNG", transparency=0))
    assert pixels[5, 5].tolist() == [255, 255, 255]
    assert pixels[5, 40].tolist() == [200, 100, 50]


def test_sixteen_bits_a_channel_keep_the_high_byte():
    rows = (scene().astype(int) * 256 + 200).astype(">u2").tobytes()
    width = W * 6
    lines = b"".join(b"\0" + rows[n * width : (n + 1) * width] for n in range(H))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", W, H, 16, 2, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    assert np.array_equal(decode(png(chunks)), scene())


def png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """A PNG of these chunks."""
    packed = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "MPO"])
def test_animations_give_their_first_frame(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(FRAMES[0], kind, save_all=True, append_images=FRAMES[1:], **options)
    assert far(decode(data), scene()) < (8 if kind == "GIF" else 3)


def test_one_pixel_is_too_small():
    assert reason(encode(Image.new("RGB", (1, 1)), "PNG")) == "too small"
    assert reason(encode(Image.new("RGB", (50, 1)), "JPEG")) == "too small"
    assert decode(encode(Image.new("RGB", (2, 3)), "JPEG")).shape == (3, 2, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_bombs_are_refused_by_their_header(kind, monkeypatch):
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("decoded a bomb")

    if kind == "PNG":  # more than Pillow warns at, and more than it refuses
        header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
        data = png([(b"IHDR", header), (b"IDAT", b""), (b"IEND", b"")])
    else:
        bomb = bytearray(encode(RGB, "JPEG"))
        at = bomb.index(b"\xff\xc0") + 5
        bomb[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
        data = bytes(bomb)
    monkeypatch.setattr(decoding, "_rgb", never)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", never)
    assert reason(data) == "too large"


def test_the_limits_are_the_callers():
    data = encode(RGB, "PNG")
    assert reason(data, max_pixels=H * W - 1) == "too large"
    assert reason(data, min_side=H + 1) == "too small"
    assert decode(data, max_pixels=H * W, min_side=H).shape == (H, W, 3)


def test_between_pillows_warning_and_our_limit_nothing_is_said(recwarn):
    data = encode(Image.new("L", (10_000, 9_500)), "PNG")
    picture = open_picture(data)
    assert (picture.height, picture.width) == (9_500, 10_000)
    assert not recwarn


@pytest.mark.parametrize("reduce", [2, 4, 8])
@pytest.mark.parametrize("orientation", [1, 6])
def test_smaller_decoding_is_an_area_mean(reduce, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(RGB.resize((200, 136)), "JPEG", quality=95, exif=exif)
    picture = open_picture(data)
    whole, small = picture.pixels(), picture.pixels(reduce=reduce)
    assert small.shape[:2] == (picture.height // reduce, picture.width // reduce)
    mean = whole.reshape(small.shape[0], reduce, small.shape[1], reduce, 3).mean((1, 3))
    assert far(small, mean) < 1.5


def test_lent_pixels_are_the_same_until_the_threads_next():
    data = [encode(RGB.rotate(a, expand=True), "JPEG") for a in (0, 90)]
    lent = open_picture(data[0]).pixels(lent=True)
    assert np.array_equal(lent, decode(data[0]))
    kept = lent.copy()
    thread = threading.Thread(target=lambda: open_picture(data[1]).pixels(lent=True))
    thread.start()
    thread.join()
    assert np.array_equal(lent, kept)
