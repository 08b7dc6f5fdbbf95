"""Videos in the layout of DAVIS 2017: what is read, what is refused, what is skipped."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from contramask.data.video_files import (
    frame_size,
    palette,
    read_frames,
    read_mask,
    write_mask,
)
from contramask.data.videos import find_videos
from contramask.types import UserError
from tests.probes.moving import SIZE, frame, write_set


@pytest.fixture
def root(tmp_path):
    return write_set(tmp_path / "set", {"cat": 4, "dog": 5})


def frames_of(root, name="cat"):
    return root / "JPEGImages" / "480p" / name


def masks_of(root, name="cat"):
    return root / "Annotations" / "480p" / name


def test_a_set_is_found(root):
    found = find_videos(root)
    assert [video.name for video in found.videos] == ["cat", "dog"]
    assert not found.skipped
    cat = found.videos[0]
    assert [path.name for path in cat.frames] == [f"{t:05d}.jpg" for t in range(4)]
    assert (cat.size, cat.objects) == (SIZE, (2, 5))
    assert cat.categories == {2: "red square", 5: "blue square"}
    assert np.array_equal(cat.mask(3), frame(0, 3)[1])
    assert len(find_videos(root, limit=1).videos) == 1


def test_frames_are_read_in_order_and_resized(root):
    video = find_videos(root).videos[1]
    for workers in (1, 3):
        found = list(read_frames(video.frames, SIZE, stored=SIZE, workers=workers))
        assert len(found) == 5
        for t, image in enumerate(found):
            assert image.shape == (3, *SIZE)
            true = frame(1, t)[0].astype(int)
            assert np.abs(image.permute(1, 2, 0).numpy() - true).mean() < 3  # JPEG
    (small, *_) = read_frames(video.frames, (12, 16), stored=SIZE)
    assert small.shape == (3, 12, 16)


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((480, 854), {"patch": 16}, (480, 832)),  # the official sizes of DAVIS
        ((480, 854), {"patch": 8}, (480, 832)),
        ((480, 910), {"patch": 16}, (480, 896)),
        ((854, 480), {"patch": 16}, (832, 480)),
        ((480, 854), {"patch": 14}, (476, 840 + 14)),
        ((240, 432), {"patch": 4, "short_side": 240}, (240, 432)),
        ((240, 432), {"patch": 4, "short_side": 33}, (32, 56)),
        ((240, 432), {"patch": 16, "short_side": 224, "long_side": 224}, (224, 224)),
    ],
)
def test_sizes_of_frames(size, options, expected):
    assert frame_size(size, **options) == expected


def test_frames_smaller_than_a_patch_are_refused():
    with pytest.raises(UserError, match="less than a patch of 16; set --short_side to 16"):
        frame_size((240, 432), patch=16, short_side=12)


def test_masks_go_through_palette_files(tmp_path):
    mask = torch.randint(0, 255, (7, 9), dtype=torch.uint8)
    write_mask(tmp_path / "new" / "00001.png", mask)
    with Image.open(tmp_path / "new" / "00001.png") as image:
        assert image.mode == "P"
        colours = np.asarray(image.convert("RGB"))
    assert torch.equal(read_mask(tmp_path / "new" / "00001.png"), mask)
    assert np.array_equal(colours, palette()[mask.numpy()])


def test_the_palette_is_that_of_pascal_voc():
    first = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128]]
    assert palette()[:6].tolist() == first
    assert palette()[[8, 16, 22, 255]].tolist() == [
        [64, 0, 0], [0, 64, 0], [0, 192, 128], [224, 224, 192],
    ]  # fmt: skip


def test_void_is_background(root):
    path = masks_of(root) / "00002.png"
    write_mask(path, torch.full(SIZE, 255, dtype=torch.uint8))
    assert not find_videos(root).videos[0].mask(2).any()


def test_videos_that_cannot_be_tracked_are_skipped_with_the_reason(root):
    write_set(root, {"still": 1, "blank": 3, "bare": 3, "cow": 3}, split="other")
    (masks_of(root, "bare") / "00000.png").unlink()
    write_mask(masks_of(root, "blank") / "00000.png", torch.zeros(SIZE, dtype=torch.uint8))
    found = find_videos(root, split="other")
    assert [video.name for video in found.videos] == ["cow"]
    assert found.skipped.keys() == {"still", "blank", "bare"}
    assert "one frame only" in found.skipped["still"]
    assert "no object in its first mask" in found.skipped["blank"]
    assert "first frame 00000 has no mask" in found.skipped["bare"]
    with pytest.raises(UserError, match=r"none of the 2 videos .* be tracked; the first, still"):
        find_videos(root, split="other", limit=2)


def test_later_masks_may_be_missing(root):
    (masks_of(root) / "00002.png").unlink()
    video = find_videos(root).videos[0]
    assert video.mask(2) is None
    assert video.mask(3) is not None


def lose_frame(root):
    (frames_of(root) / "00002.jpg").unlink()


def lose_frame_and_mask(root):
    lose_frame(root)
    (masks_of(root) / "00002.png").unlink()


def lose_folder(root):
    frames_of(root).rename(root / "elsewhere")


def large_mask(root):
    write_mask(masks_of(root) / "00002.png", torch.zeros(80, 112, dtype=torch.uint8))


def large_frame(root):
    Image.new("RGB", (112, 80)).save(frames_of(root) / "00001.jpg")


def coloured_mask(root):
    Image.new("RGB", SIZE[::-1]).save(masks_of(root) / "00000.png")


def no_image(root):
    (masks_of(root) / "00001.png").write_bytes(b"nothing")


def huge_header(path):
    """A PNG whose header promises more pixels than Pillow would decode."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 3, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"PLTE", bytes(6)), (b"IDAT", zlib.compress(b"")))
    data = b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


def huge_mask(root):
    huge_header(masks_of(root) / "00001.png")


def huge_frame(root):
    (frames_of(root) / "00000.jpg").unlink()
    huge_header(frames_of(root) / "00000.png")


def path_in_list(root):
    (root / "ImageSets" / "2017" / "val.txt").write_text("dog\n\n../480p/cat\n")


def absolute_path_in_list(root):
    (root / "ImageSets" / "2017" / "val.txt").write_text(f"{frames_of(root)}\n")


def parent_in_list(root):
    (root / "ImageSets" / "2017" / "val.txt").write_text("cat\n ..\n")


def empty_list(root):
    (root / "ImageSets" / "2017" / "val.txt").write_text("\n\n")


def no_list(root):
    (root / "ImageSets" / "2017" / "val.txt").unlink()


def broken_json(root):
    (root / "davis_semantics.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lose_frame, "00002.png is the mask of a frame that is missing|frames of cat are missing"),
        (lose_frame_and_mask, "frames of cat are missing between 00001 and 00003; .* steps of 1"),
        (lose_folder, "cat has no frames; cat is in the set"),
        (large_mask, r"00002.png has 80 x 112 pixels, the first frame of its video 48 x 68"),
        (large_frame, r"00001.jpg has 80 x 112 pixels, the first frame of its video 48 x 68"),
        (coloured_mask, "00000.png is a mask of mode RGB; allowed is a palette PNG"),
        (no_image, "00001.png cannot be read"),
        (huge_mask, "00001.png cannot be read .*decompression bomb"),
        (huge_frame, "00000.png cannot be read .*decompression bomb"),
        (path_in_list, r"line 3 of .*val.txt is '../480p/cat'; a line is the name of a folder"),
        (absolute_path_in_list, "line 1 of .*val.txt is '/.*; a line is the name of a folder"),
        (parent_in_list, r"line 2 of .*val.txt is ' ..'; a line is the name of a folder"),
        (empty_list, "val.txt names no video"),
        (no_list, "val.txt cannot be read; .* --videos, --set and --year"),
        (broken_json, "davis_semantics.json cannot be read as JSON"),
    ],
)
def test_damage_is_told(root, damage, told):
    damage(root)
    with pytest.raises(UserError, match=told):
        find_videos(root)


def test_a_mask_that_grew_is_refused_before_it_is_decoded(root, monkeypatch):
    video = find_videos(root).videos[0]
    large_mask(root)
    monkeypatch.setattr(np, "array", None)
    with pytest.raises(UserError, match=r"00002.png has 80 x 112 pixels, the first frame of its"):
        video.mask(2)
    huge_mask(root)
    with pytest.raises(UserError, match=r"00001.png cannot be read .*decompression bomb"):
        video.mask(1)
    with pytest.raises(UserError, match=r"00001.png cannot be read .*decompression bomb"):
        read_mask(masks_of(root) / "00001.png")


def test_a_frame_cut_short_is_told_when_it_is_read(root):
    path = frames_of(root) / "00001.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    video = find_videos(root).videos[0]
    with pytest.raises(UserError, match=r"00001.jpg cannot be read \(truncated"):
        list(read_frames(video.frames, SIZE, stored=SIZE))


def test_daviss_list_of_categories_is_no_list_of_objects(root):
    """The package of semantics has a categories.json of another kind."""
    (root / "davis_semantics.json").unlink()
    other = {"cat": {"id": 3, "super_category": "animal"}}
    (root / "categories.json").write_text(json.dumps(other))
    assert find_videos(root).videos[0].categories == {}


def test_changed_files_have_another_stamp(root):
    before = [video.stamp for video in find_videos(root).videos]
    assert before == [video.stamp for video in find_videos(root).videos]
    write_mask(masks_of(root) / "00003.png", torch.ones(SIZE, dtype=torch.uint8))
    after = [video.stamp for video in find_videos(root).videos]
    assert (before[0] != after[0], before[1] == after[1]) == (True, True)
