"""Small shards of the embedded data set, for commands."""

import pytest

from contramask.data.procedural import write_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> dict[str, str]:
    """Patterns of train (256 images) and val (64) shards of 32-pixel images."""
    folder = tmp_path_factory.mktemp("shards")
    return write_shards(folder, images=256, val_images=64, size=32, shards=3)


@pytest.fixture
def data(shards) -> list[str]:
    """The options that name them."""
    return ["--data.train", shards["train"], "--data.val", shards["val"]]
