"""Transformations with maps of patches: each patch carries its number as its colour."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from contramask.functional.warps import Warp, origins, warp
from contramask.types import UserError

P, ROWS, COLUMNS = 10, 5, 7
SIZE = (ROWS * P, COLUMNS * P)
N = ROWS * COLUMNS
KEYS = ["apple", "pear"]


def numbered() -> torch.Tensor:
    """(1, 3, H, W): patch n has the colour (n + 1) / 100; 0 is what lies outside."""
    plane = (torch.arange(N).view(ROWS, COLUMNS) + 1) / 100
    plane = plane.repeat_interleave(P, 0).repeat_interleave(P, 1)
    return plane.expand(1, 3, *SIZE).contiguous()


def seen(image: torch.Tensor) -> list[int | None]:
    """The number that is painted at the centre of each patch; -1: nothing; None: an edge.

    P is even, so that the centre is the corner of four pixels, and all four must agree.
    """
    at = slice(P // 2 - 1, P // 2 + 1)
    middle = image[0, 0].view(ROWS, P, COLUMNS, P)[:, at, :, at]
    low, high = middle.amin((1, 3)).flatten(), middle.amax((1, 3)).flatten()
    return [
        round(100 * a.item()) - 1 if b - a < 1e-4 else None for a, b in zip(low, high, strict=True)
    ]


def photographs(number: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(number, 3, *SIZE, generator=generator)


@pytest.mark.parametrize(
    "name",
    ["none", "shift2", "shift10", "shift-11", "shift48", "rotate5", "rotate20", "rotate-30",
     "rotate90", "rotate180", "scale0.8", "scale1.2", "scale0.5", "scale3"],
)  # fmt: skip
def test_the_map_says_what_is_painted_at_the_centre_of_each_patch(name: str):
    image, found = warp(numbered(), Warp.parse(name), keys=["x"], patch=P)
    assert found.shape == (N,)
    told = [(a, b) for a, b in zip(seen(image), found.tolist(), strict=True) if a is not None]
    assert [a for a, _ in told] == [b for _, b in told]
    assert len(told) >= N // 2  # the others show an edge at their centre


def test_maps_by_hand():
    assert origins(Warp.parse("none"), (4, 6), 2).tolist() == [0, 1, 2, 3, 4, 5]
    # One patch to the right and down: row 0 and column 0 are new.
    assert origins(Warp.parse("shift2"), (4, 6), 2).tolist() == [-1, -1, -1, -1, 0, 1]
    # Half a patch: the centre comes from the corner of four, the one to the right and below wins.
    assert origins(Warp.parse("shift1"), (4, 6), 2).tolist() == [0, 1, 2, 3, 4, 5]
    assert origins(Warp.parse("shift-1"), (4, 6), 2).tolist() == [4, 5, -1, -1, -1, -1]
    assert origins(Warp.parse("rotate180"), (4, 6), 2).tolist() == [5, 4, 3, 2, 1, 0]
    assert origins(Warp.parse("rotate90"), (4, 4), 2).tolist() == [2, 0, 3, 1]
    # Twice as large: 4 x 4 patches show the middle 2 x 2.
    assert origins(Warp.parse("scale2"), (8, 8), 2).tolist() == [
        *(5, 5, 6, 6), *(5, 5, 6, 6), *(9, 9, 10, 10), *(9, 9, 10, 10)
    ]  # fmt: skip
    for name in ("blur3", "noise30"):
        assert origins(Warp.parse(name), (4, 6), 2).tolist() == [0, 1, 2, 3, 4, 5]


@settings(max_examples=40)
@given(
    name=st.one_of(
        st.integers(-20, 20).map(lambda n: f"shift{n}"),
        st.floats(-180, 180).map(lambda a: f"rotate{a:.3f}"),
        st.floats(0.3, 3).map(lambda s: f"scale{s:.3f}"),
    )
)
def test_the_origin_is_the_patch_whose_warped_centre_is_nearest(name: str):
    """By loops over all pairs of patches, forwards."""
    wanted = Warp.parse(name)
    angle = math.radians(wanted.amount) if wanted.kind == "rotate" else 0
    scale = wanted.amount if wanted.kind == "scale" else 1
    shift = wanted.amount if wanted.kind == "shift" else 0
    height, width = SIZE
    centres = [((c + 0.5) * P, (r + 0.5) * P) for r in range(ROWS) for c in range(COLUMNS)]

    def forwards(x: float, y: float) -> tuple[float, float]:
        x, y = x - width / 2, y - height / 2
        turned = (
            x * math.cos(angle) - y * math.sin(angle),
            x * math.sin(angle) + y * math.cos(angle),
        )
        return (scale * turned[0] + width / 2 + shift, scale * turned[1] + height / 2 + shift)

    for (x, y), found in zip(centres, origins(wanted, SIZE, P).tolist(), strict=True):
        away = [math.dist(forwards(*centre), (x, y)) for centre in centres]
        if found >= 0:
            assert away[found] <= min(away) + 1e-6
            assert away[found] <= scale * P / math.sqrt(2) + 1e-6
        else:  # outside: at least half a patch beyond the centre of the nearest
            assert min(away) >= scale * P / 2 - 1e-6


def test_a_shift_moves_pixels_and_fills_with_black():
    images = photographs()
    moved, _ = warp(images, Warp.parse("shift4"), keys=KEYS, patch=P)
    assert torch.equal(moved[..., 4:, 4:], images[..., :-4, :-4])
    assert not moved[..., :4, :].any()
    assert not moved[..., :4].any()


def test_the_number_of_a_blur_is_its_standard_deviation():
    image = torch.zeros(1, 3, 41, 41)
    image[..., 20, 20] = 1
    moved, _ = warp(image, Warp.parse("blur3"), keys=["x"], patch=41)
    at = torch.arange(41) - 20.0
    spread = (moved[0, 0].sum(0) * at**2).sum().sqrt().item()
    assert spread == pytest.approx(3, abs=0.06)  # the tails beyond 3 sigma are cut off
    theirs = ndimage.gaussian_filter(photographs()[0, 1].numpy(), 2, mode="mirror", truncate=3)
    ours, _ = warp(photographs(), Warp.parse("blur2"), keys=KEYS, patch=P)
    torch.testing.assert_close(ours[0, 1], torch.from_numpy(theirs), atol=1e-5, rtol=0)


def test_a_blur_wider_than_the_image_still_has_a_mirror():
    images = photographs()[..., :P, :]
    moved, _ = warp(images, Warp.parse("blur8"), keys=KEYS, patch=P)
    assert moved.isfinite().all()
    assert moved.std() < images.std() / 5
    torch.testing.assert_close(moved.mean(), images.mean(), atol=0.05, rtol=0)


def test_noise_is_a_function_of_seed_key_and_name_alone():
    images = torch.full((2, 3, *SIZE), 0.5)
    both, _ = warp(images, Warp.parse("noise20"), keys=KEYS, patch=P)
    alone, _ = warp(images[:1], Warp.parse("noise20"), keys=["pear"], patch=P)
    assert torch.equal(alone[0], both[1])
    assert (both - 0.5).std().item() == pytest.approx(20 / 255, rel=0.05)
    for other in (
        warp(images, Warp.parse("noise20"), keys=["plum", "kiwi"], patch=P)[0],
        warp(images, Warp.parse("noise20"), keys=KEYS, patch=P, seed=1)[0],
    ):
        correlation = torch.corrcoef(torch.stack([both.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation.item()) < 0.1


@pytest.mark.parametrize("name", ["noise40", "rotate33", "scale1.3", "scale0.7"])
def test_results_stay_in_range(name: str):
    moved, _ = warp(photographs(), Warp.parse(name), keys=KEYS, patch=P)
    assert moved.shape == (2, 3, *SIZE)
    assert 0 <= moved.min() < moved.max() <= 1


@pytest.mark.parametrize(
    "name",
    ["turn5", "rotate", "none3", "blur0", "blur-2", "noise0", "noise-1", "scale0", "scale-1",
     "shift1.5", "", "5", "shift1px", "rotate5,6"],
)  # fmt: skip
def test_what_is_no_warp_is_named(name: str):
    with pytest.raises(UserError, match=r"warp: .* is none of none, shift3 .*; set warps"):
        Warp.parse(name)


@pytest.mark.parametrize(
    "name", ["none", "shift3", "shift-3", "blur2.5", "noise3", "rotate-5", "scale0.8"]
)
def test_a_warp_reads_its_own_name(name: str):
    assert str(Warp.parse(name)) == name


def test_half_patches_are_refused():
    with pytest.raises(UserError, match="50 x 70 pixels is no whole number of patches of 4"):
        warp(photographs(), Warp.parse("shift1"), keys=KEYS, patch=4)
