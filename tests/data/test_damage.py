"""Damaged files are refused, whatever is damaged, and with nothing but `BadImage`."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from contramask.data.decode import BadImage, decode
from tests.data.test_decode import FRAMES, RGB, RGBA, encode, reason


@pytest.mark.parametrize("data", [b"", b"\0" * 300, b"no image " * 30, b"\xff\xd8", b"\x89PNG"])
def test_what_is_no_image(data):
    assert reason(data) == "not an image"


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("part", [0.4, 0.6, 0.8, 0.97])
@pytest.mark.parametrize("tail", [b"", b"\xff\xd9", b"\0" * 900])
def test_a_cut_jpeg_is_never_half_used(part, tail, progressive):
    noise = np.random.default_rng(0).integers(0, 256, (96, 80, 3)).astype(np.uint8)
    data = encode(Image.fromarray(noise), "JPEG", progressive=progressive)
    assert reason(data[: int(len(data) * part)] + tail) in ("truncated", "corrupt")


def test_a_cut_jpeg_is_called_truncated():
    data = encode(RGB, "JPEG")
    assert reason(data[: len(data) * 3 // 4]) == "truncated"


def test_a_jpeg_that_only_lacks_its_end_is_used():
    data = encode(RGB, "JPEG")
    assert data.endswith(b"\xff\xd9")
    assert np.array_equal(decode(data[:-2]), decode(data))
    assert np.array_equal(decode(data + b"and more"), decode(data))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP"])
def test_other_cut_files_are_refused(kind):
    data = encode(RGB, kind)
    assert reason(data[: len(data) * 3 // 4]) in ("truncated", "corrupt", "not an image")


def test_a_damaged_scan_is_corrupt():
    data = bytearray(encode(RGB, "JPEG"))
    data[-400:-300] = b"\xff\xd0" * 50
    assert reason(bytes(data)) == "corrupt"


SAMPLES = {
    "jpeg": encode(RGB, "JPEG"),
    "cmyk": encode(RGB.convert("CMYK"), "JPEG"),
    "png": encode(RGBA, "PNG"),
    "webp": encode(RGB, "WEBP"),
    "gif": encode(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
}


@settings(max_examples=150)
@given(
    kind=st.sampled_from(sorted(SAMPLES)),
    places=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=6),
    length=st.floats(0.3, 1.0),
)
def test_damage_raises_nothing_but_bad_image(kind, places, length):
    data = bytearray(SAMPLES[kind])
    for at, value in places:
        data[int(at * len(data))] = value
    try:
        pixels = decode(bytes(data[: int(length * len(data))]), max_pixels=10_000_000)
    except BadImage:
        return
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
