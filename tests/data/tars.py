"""Small shards for tests, written by Python's tarfile: not by the code under test."""

import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from contramask.data.faults import BadSample


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], **kwargs) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **kwargs) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def numbered(first: int, count: int, *, labels: bool = True) -> list[tuple[str, bytes]]:
    """Samples whose "image" is their number, of sizes that differ."""
    members = []
    for n in range(first, first + count):
        members.append((f"s{n:05d}.jpg", f"{n}".encode() + b" " * (n * 37 % 1500)))
        if labels:
            members.append((f"s{n:05d}.cls", f"{n % 10}".encode()))
    return members


def numbered_shards(folder: Path, counts: Sequence[int], **kwargs) -> list[str]:
    """`part-000000.tar` and so on, of so many numbered samples each."""
    paths, first = [], 0
    for i, count in enumerate(counts):
        path = write_tar(folder / f"part-{i:06d}.tar", numbered(first, count, **kwargs))
        paths.append(str(path))
        first += count
    return paths


def number(members, key) -> tuple[int, int]:
    """Decodes a numbered sample: (number, seed of the sample)."""
    if "jpg" not in members:
        raise BadSample("missing key", "no image")
    return int(members["jpg"]), key


def numbers(items) -> dict:
    """Collates numbered samples."""
    return {"numbers": [n for n, _ in items], "seeds": [k for _, k in items]}


def photo(n: int, size: tuple[int, int] = (23, 17), suffix: str = "png") -> bytes:
    """An image that differs from any other."""
    pixels = np.random.default_rng(n).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
    return out.getvalue()


def photo_shards(folder: Path, counts: Sequence[int], *, classes: int = 3) -> list[str]:
    """Shards of real images with labels."""
    paths, first = [], 0
    for i, count in enumerate(counts):
        members = []
        for n in range(first, first + count):
            members += [(f"p{n:04d}.png", photo(n)), (f"p{n:04d}.cls", f"{n % classes}".encode())]
        paths.append(str(write_tar(folder / f"train-{i:06d}.tar", members)))
        first += count
    return paths


def listed(path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}


def samples_of(folder, prefix) -> dict[str, dict[str, bytes]]:
    """Note "file" -> members, over all shards of a prefix."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(Path(folder).glob(f"{prefix}-*.tar")):
        for name, data in listed(path).items():
            key, suffix = name.split(".", 1)
            found.setdefault(key, {})[suffix] = data
    return {json.loads(m["json"])["file"]: m for m in found.values()}


def spoil(path, at, data):
    """Overwrites bytes without changing the size."""
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def header_of(path, number):
    with tarfile.open(path) as tar:
        return tar.getmembers()[number].offset


def cut(path, at):
    os.truncate(path, at)
