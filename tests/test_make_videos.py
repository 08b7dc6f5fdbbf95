"""The script that makes videos of real textures."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scripts.make_videos import make

from contramask.data.videos import find_videos
from contramask.types import UserError

SIZE = (72, 104)


@pytest.fixture(scope="module")
def made(shared_data, tmp_path_factory) -> tuple[Path, Path]:
    root = shared_data("camvid").parent
    shared_data("imagenet-sample")
    out = tmp_path_factory.mktemp("videos")
    make(root, out, videos=2, frames=3, size=SIZE, seed=4)
    return root, out


def test_what_is_made_is_a_set_that_can_be_tracked(made):
    _, out = made
    found = find_videos(out, resolution="72p")
    assert len(found.videos) == 2
    assert not found.skipped
    named = json.loads((out / "categories.json").read_text())
    for video in found.videos:
        assert (video.size, len(video.frames)) == (SIZE, 3)
        # Every object is there in the first mask, and known by name.
        assert video.objects == tuple(range(1, len(named[video.name]) + 1))
        assert video.categories == {int(i): c for i, c in named[video.name].items()}
        assert min((video.mask(0) == i).sum() for i in video.objects) > 20
        assert (video.mask(0) != video.mask(2)).any()  # something moves


def test_masks_are_exact(made, monkeypatch):
    """Where a mask says background, the frame is what it is without objects, and nowhere else."""
    from scripts import make_videos

    root, _ = made
    rng = np.random.default_rng(0)
    scene = make_videos.Scene(make_videos.Material(root), rng, SIZE, post=False)
    frame, mask, _ = scene.draw(0.3)
    scene.objects, scene.paths = [], []
    bare, _, _ = scene.draw(0.3)
    same = (frame == bare).all(2)
    assert not same[mask > 0].mean() > 0.05
    assert same[mask == 0].mean() > 0.9  # but for the soft edges of about a pixel


def test_the_same_arguments_give_the_same_pixels(made, tmp_path):
    root, out = made
    make(root, tmp_path, videos=1, frames=3, size=SIZE, seed=4)
    for path in sorted(tmp_path.rglob("*.??g")):
        assert path.read_bytes() == (out / path.relative_to(tmp_path)).read_bytes()
    with Image.open(tmp_path / "Annotations" / "72p" / "val-000" / "00002.png") as mask:
        assert mask.mode == "P"


def test_mistakes_are_told(tmp_path):
    with pytest.raises(UserError, match="camvid has no shards"):
        make(tmp_path, tmp_path / "out", videos=1, frames=3, size=SIZE)
    with pytest.raises(UserError, match="2 frames, 72 x 104 pixels; allowed are"):
        make(tmp_path, tmp_path / "out", videos=1, frames=2, size=SIZE)
