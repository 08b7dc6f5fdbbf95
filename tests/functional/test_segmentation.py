"""Tiles, patches and pixels against loops over pixels, torch's resize and scikit-learn."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score
from torchmetrics.classification import MulticlassJaccardIndex

from contramask.functional.segmentation import (
    VOID,
    Tiling,
    confusion,
    nearest_index,
    pixels_of_class,
    scores,
)
from contramask.types import UserError

CLASSES = 5
SIZES = st.integers(1, 40)


def labels(*shape: int, seed: int = 0, classes: int = CLASSES) -> torch.Tensor:
    """Labels of which some are void."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, classes, shape, generator=generator)


@pytest.mark.parametrize(("length", "size"), [(256, 14), (14, 256), (7, 3), (480, 35), (5, 5)])
def test_resizing_labels_is_torchs_nearest_exact(length: int, size: int):
    mask = torch.arange(length).float()[None, None]
    resized = F.interpolate(mask, size=size, mode="nearest-exact")[0, 0]
    assert nearest_index(length, size).tolist() == resized.long().tolist()


def test_tiles_of_both_edges_by_hand():
    image = torch.arange(5 * 7).view(5, 7)
    pad, overlap = Tiling(3, 3), Tiling(3, 3, "overlap")
    assert (pad.starts(7), overlap.starts(7)) == ([0, 3, 6], [0, 3, 4])
    assert (pad.starts(2), overlap.starts(2)) == ([0], [0])
    assert pad.count(5, 7) == 6
    tiles = pad.cut(image, torch.tensor(-5))
    assert tiles[2].tolist() == [[6, -5, -5], [13, -5, -5], [20, -5, -5]]
    tiles = overlap.cut(image, torch.tensor(-5))
    assert tiles[5].tolist() == [[18, 19, 20], [25, 26, 27], [32, 33, 34]]
    few = overlap.cut(image[:2, :2], torch.tensor(-5))
    assert few.tolist() == [[[0, 1, -5], [7, 8, -5], [-5, -5, -5]]]
    colours = Tiling(4, 2).cut(torch.zeros(5, 7, 3), torch.tensor([1.0, 2.0, 3.0]))
    assert colours.shape == (4, 4, 4, 3)
    assert colours[3, 1, 0].tolist() == [1, 2, 3]


def test_a_tile_of_fewer_pixels_than_patches_is_refused():
    with pytest.raises(UserError, match="tile is 13 pixels and has 14 patches a side"):
        Tiling(13, 14)


@given(SIZES, SIZES, st.integers(3, 11), st.integers(1, 3), st.sampled_from(["pad", "overlap"]))
def test_each_pixel_finds_the_patch_that_sees_it(height, width, tile, grid, edge):
    """Each pixel looked up in the tiles that are cut: the patch is that of nearest-exact."""
    tiling = Tiling(tile, grid, edge)
    number = torch.arange(height * width).view(height, width)
    tiles = tiling.cut(number, torch.tensor(-1))
    found = tiling.patch_of_pixel(height, width)
    for y in range(height):
        for x in range(width):
            first = int((tiles.flatten(1) == number[y, x]).any(1).nonzero()[0])
            if edge == "overlap":  # of pixels in two tiles the first row and column of tiles
                many = len(tiling.starts(width))
                first = y // tile * many + x // tile
            (row, column) = (tiles[first] == number[y, x]).nonzero()[0].tolist()
            patch = [int((at + 0.5) * grid / tile) for at in (row, column)]
            assert found[y, x] == (first * grid + patch[0]) * grid + patch[1]


@given(SIZES, SIZES, st.integers(3, 11), st.integers(1, 3), st.sampled_from(["pad", "overlap"]))
def test_labels_of_patches_come_from_their_own_pixels(height, width, tile, grid, edge):
    tiling, mask = Tiling(tile, grid, edge), labels(height, width)
    patches = tiling.count(height, width) * grid**2
    of_pixel = tiling.patch_of_pixel(height, width)
    middle = tiling.labels(mask, classes=CLASSES).flatten()
    majority = tiling.labels(mask, classes=CLASSES, rule="majority").flatten()
    assert len(middle) == len(majority) == patches
    for patch in range(patches):
        inside = mask[of_pixel == patch].tolist()
        assert middle[patch] in [*inside, VOID]
        if not inside:
            assert middle[patch] == majority[patch] == VOID
            continue
        most = max(inside.count(c) for c in range(-1, CLASSES))
        best = [c for c in [*range(CLASSES), VOID] if inside.count(c) == most]
        assert majority[patch] == best[0]


def test_the_middle_label_is_torchs_resize_of_each_tile():
    mask = labels(512, 768)  # the paper's tile of 256 pixels with 14 patches a side
    found = Tiling(256, 14).labels(mask, classes=CLASSES).view(2, 3, 14, 14)
    for i in range(2):
        for j in range(3):
            part = mask[256 * i : 256 * i + 256, 256 * j : 256 * j + 256].float()
            resized = F.interpolate(part[None, None], size=14, mode="nearest-exact")[0, 0]
            assert found[i, j].tolist() == resized.long().tolist()


def test_a_resized_image_is_scored_at_the_pixels_of_its_mask():
    tiling = Tiling(4, 2)
    seen = tiling.patch_of_pixel(8, 12)
    found = tiling.patch_of_pixel(21, 17, seen=(8, 12))
    expected = F.interpolate(seen[None, None].float(), size=(21, 17), mode="nearest-exact")
    assert torch.equal(found, expected[0, 0].long())


def test_confusion_and_iou_by_hand():
    # Patches: 0 holds 3 pixels of class 0 and 1 of class 1; 1 holds 2 of class 1; 2 only void.
    mask = torch.tensor([[0, 0, 1, 1, -1], [0, 1, -1, -1, -1]])
    patch = torch.tensor([[0, 0, 1, 1, 2], [0, 0, 2, 2, 2]])
    pixels = pixels_of_class(patch, mask, 3, 4)
    assert pixels.tolist() == [[3, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0]]
    confused = confusion(pixels, torch.tensor([0, 2, 3]))
    assert confused.tolist() == [[3, 0, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    found = scores(confused)
    # Class 0: 3 / (3 + 1). Class 1: 0 / 3. Class 2: predicted, never true: 0. Class 3: absent.
    assert found.iou == [0.75, 0.0, 0.0, None]
    assert found.miou == pytest.approx(0.25)
    assert found.pixel_top1 == pytest.approx(0.5)


@pytest.mark.parametrize("edge", ["pad", "overlap"])
def test_scores_are_those_of_the_joined_masks(edge):
    """The whole way against a loop, scikit-learn and torchmetrics on masks drawn at full size."""
    tiling, height, width, seen = Tiling(11, 3, edge), 33, 41, (24, 35)
    truth = labels(height, width, classes=CLASSES - 1)  # one class is absent
    patches = tiling.count(*seen) * 9
    predicted = labels(patches, seed=1, classes=CLASSES - 1).clamp(min=0)
    patch = tiling.patch_of_pixel(height, width, seen=seen)
    confused = confusion(pixels_of_class(patch, truth, patches, CLASSES), predicted)
    drawn = predicted[patch]
    expected = np.zeros((CLASSES, CLASSES), int)
    for t, p in zip(truth.flatten().tolist(), drawn.flatten().tolist(), strict=True):
        if t != VOID:
            expected[t, p] += 1
    assert confused.tolist() == expected.tolist()

    found = scores(confused)
    known = truth != VOID
    each = jaccard_score(truth[known], drawn[known], labels=range(CLASSES - 1), average=None)
    assert found.iou[:-1] == pytest.approx(each.tolist())
    assert found.iou[-1] is None
    macro = jaccard_score(truth[known], drawn[known], average="macro")
    assert found.miou == pytest.approx(macro)
    metric = MulticlassJaccardIndex(CLASSES, ignore_index=VOID)
    assert found.miou == pytest.approx(metric(drawn, truth).item())
    assert found.pixel_top1 == pytest.approx((truth == drawn)[known].float().mean().item())


def test_masks_without_a_labelled_pixel_have_no_score():
    with pytest.raises(UserError, match="no labelled pixel"):
        scores(torch.zeros(3, 3, dtype=torch.long))
