"""The script that makes videos of real textures."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
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
    """Where a mask says background, the frame is what it is without objects, and nowhere else.

    Edges are soft, so a band of two pixels on both sides of the outlines says nothing.
    """
    from scripts import make_videos

    root, _ = made
    rng = np.random.default_rng(0)
    scene = make_videos.Scene(make_videos.Material(root), rng, SIZE, post=False)
    frame, mask, _ = scene.draw(0.3)
    scene.objects, scene.paths = [], []
    bare, _, _ = scene.draw(0.3)
    away = np.abs(frame.astype(int) - bare).max(2)
    inside, outside = (ndimage.binary_erosion(m, np.ones((5, 5))) for m in (mask > 0, mask == 0))
    assert min(inside.mean(), outside.mean()) > 0.05
    assert away[outside].max() <= 8
    assert (away[outside] > 1).mean() < 0.01
    assert (away[inside] > 1).mean() > 0.99  # a pixel of an object may have the background's colour


def test_the_same_arguments_give_the_same_pixels(made, tmp_path):
    root, out = made
    make(root, tmp_path, videos=1, frames=3, size=SIZE, seed=4)
    for path in sorted(tmp_path.rglob("*.??g")):
        assert path.read_bytes() == (out / path.relative_to(tmp_path)).read_bytes()
    with Image.open(tmp_path / "Annotations" / "72p" / "val-000" / "00002.png") as mask:
        assert mask.mode == "P"


def test_a_second_set_leaves_the_first_as_it_was(made, tmp_path):
    root, _ = made
    make(root, tmp_path, videos=1, frames=4, size=SIZE, seed=4)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for size in (SIZE, (96, 128)):  # categories would be those of one of the two
        with pytest.raises(UserError, match=r"there already .*; set another OUT or --set"):
            make(root, tmp_path, videos=2, frames=3, size=size, seed=5)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    first = json.loads((tmp_path / "categories.json").read_text())
    make(root, tmp_path, videos=1, frames=3, size=SIZE, seed=5, split="test")
    both = json.loads((tmp_path / "categories.json").read_text())
    assert both.keys() == {"val-000", "test-000"}
    assert both["val-000"] == first["val-000"]
    (video,) = find_videos(tmp_path, resolution="72p").videos
    assert (len(video.frames), len(video.categories)) == (4, len(first["val-000"]))


def test_mistakes_are_told(tmp_path):
    with pytest.raises(UserError, match="camvid has no shards"):
        make(tmp_path, tmp_path / "out", videos=1, frames=3, size=SIZE)
    with pytest.raises(UserError, match="2 frames, 72 x 104 pixels; allowed are"):
        make(tmp_path, tmp_path / "out", videos=1, frames=2, size=SIZE)
