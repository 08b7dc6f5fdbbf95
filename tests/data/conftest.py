"""Shards that many tests only read."""

import pytest

from contramask.data.index import build_index
from tests.data.streams import COUNTS, stream_of
from tests.data.tars import numbered_shards, photo


@pytest.fixture(scope="session")
def index(tmp_path_factory):
    return build_index(numbered_shards(tmp_path_factory.mktemp("shards"), COUNTS))


@pytest.fixture(scope="session")
def stream(index):
    return stream_of(index)


@pytest.fixture
def images(tmp_path):
    """Two classes and 39 images of several formats; cat/odd.JPEG is a PNG."""
    root = tmp_path / "images"
    for n in range(36):
        name = ("cat", "dog")[n % 2]
        suffix = ("jpg", "png", "webp")[n % 3]
        (root / name / "deep").mkdir(parents=True, exist_ok=True)
        (root / name / "deep" / f"{n:02d}.{suffix}").write_bytes(photo(n, suffix=suffix))
    (root / "cat" / "odd.JPEG").write_bytes(photo(90))
    for suffix in ("bmp", "gif"):
        (root / "dog" / f"x.{suffix}").write_bytes(photo(91, suffix=suffix))
    (root / "dog" / "note.txt").write_text("no image")
    (root / "dog" / ".hidden.jpg").write_bytes(b"no image")
    return root
