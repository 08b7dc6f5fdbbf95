"""What a JPEG says of itself before its first scan: size, depth, components and orientation.

Tens of times faster than opening the file with Pillow, which counts when a picture is one crop.
"""

import struct
from typing import NamedTuple


class JpegHeader(NamedTuple):
    """The frame header's numbers and the EXIF orientation."""

    height: int  # as stored, before the orientation
    width: int
    bits: int
    components: int
    orientation: int  # 1 to 8


def read(data: bytes) -> JpegHeader | None:
    """The header of a file that begins with a JPEG's first marker; None where it has none."""
    at, orientation, end = 2, 1, len(data)
    while at + 4 <= end:
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a length
            at += 2
            continue
        length = int.from_bytes(data[at + 2 : at + 4])
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if at + 10 > end:
                return None
            bits, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
            return JpegHeader(height, width, bits, components, orientation)
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _exif_orientation(data[at + 10 : at + 2 + length])
        if marker in (0xD9, 0xDA):
            return None
        at += 2 + length
    return None


def _exif_orientation(tiff: bytes) -> int:
    """The orientation in the first directory of a TIFF header; 1 where there is none."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return 1
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    if start + 2 > len(tiff):
        return 1
    (entries,) = struct.unpack_from(order + "H", tiff, start)
    for at in range(start + 2, min(start + 2 + 12 * entries, len(tiff) - 11), 12):
        tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, at)
        if tag == 0x0112:
            return value if kind == 3 and 1 <= value <= 8 else 1
    return 1
