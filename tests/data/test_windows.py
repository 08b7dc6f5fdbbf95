"""Views that are windows of larger crops, and views that share them."""

import numpy as np
import pytest
import torch
import yaml

from contramask.data.crops import Crops, Window
from contramask.data.photometric import Photometric
from contramask.types import UserError
from tests.data.test_crops import CONFIGS, parsed
from tests.data.test_views import DATA, encode, make, picture

CORNER = Crops(size=21, window=Window(canvas=28))
SHIFTED = Crops(size=21, window=Window(canvas=28, shift=5, of="mild"))
WHOLE = Crops(size=28)


def places(part: torch.Tensor, whole: torch.Tensor) -> list[tuple[int, int]]:
    """Where a picture occurs in a larger one."""
    size, room = part.shape[-1], whole.shape[-1] - part.shape[-1] + 1
    at = [(i, j) for i in range(room) for j in range(room)]
    return [(i, j) for i, j in at if torch.equal(whole[:, i : i + size, j : j + size], part)]


def test_a_window_without_shift_is_the_corner():
    for key in range(20):
        part = make(mild=CORNER)(DATA, key).crops["mild"][0]
        whole = make(mild=WHOLE)(DATA, key).crops["mild"][0]
        assert torch.equal(part, whole[:, :21, :21])


def test_two_views_are_windows_of_one_crop():
    """Place, size and flip of the box are common, the shifts are uniform from 0 to 5."""
    views, found, flips = make(mild=CORNER, other=SHIFTED), set(), set()
    for key in range(300):
        whole = make(mild=WHOLE)(DATA, key).crops["mild"][0]
        both = views(DATA, key).crops
        at = places(both["other"][0], whole)
        assert len(at) == 1
        found |= set(at)
        flips.add(WHOLE.plan("mild", key, 67, 83)[0][0].flip)
        assert torch.equal(both["mild"][0], whole[:, :21, :21])
    assert found == {(i, j) for i in range(6) for j in range(6)}
    assert flips == {False, True}


def test_crops_share_one_by_one_or_all_the_same():
    one, three = Crops(size=28), Crops(number=3, size=28)
    window = Window(canvas=28, shift=7)
    for lender in (one, three):
        sharing = Crops(number=3, size=21, window=Window(canvas=28, shift=7, of="mild"))
        crops = make(mild=lender, other=sharing)(DATA, 4).crops
        at = [places(crops["other"][v], crops["mild"][v % lender.number]) for v in range(3)]
        assert all(len(a) == 1 for a in at)
        assert len({a[0] for a in at}) > 1
    alone = make(other=Crops(number=3, size=21, window=window))(DATA, 4).crops["other"]
    assert not torch.equal(alone, crops["other"])


def test_what_shares_has_colours_of_its_own_and_moves_nobody():
    grey = Photometric(grey=1.0)
    coloured = Crops(size=21, photometric=(grey,), window=SHIFTED.window)
    crops = make(mild=CORNER, other=coloured)(DATA, 4).crops
    red, green, blue = crops["other"][0]
    assert torch.equal(red, green)
    assert torch.equal(red, blue)
    assert torch.equal(crops["mild"], make(mild=CORNER)(DATA, 4).crops["mild"])
    assert crops["mild"][0, 0].ne(crops["mild"][0, 1]).any()


def test_a_window_counts_the_pixels_of_its_canvas():
    """An image is not decoded so small that the canvas would have to be blown up."""
    data = encode(picture(600, 800), "JPEG", quality=95)
    window = Window(canvas=160)
    fine = Crops(size=40, scale=(0.9, 1.0), window=window)
    part = make(mild=fine)(data, 3).crops["mild"][0]
    whole = make(mild=Crops(size=160, scale=(0.9, 1.0)))(data, 3).crops["mild"][0]
    assert torch.equal(part, whole[:, :40, :40])


@pytest.mark.parametrize("ending", ["", "_cifar"])
def test_cmae(ending):
    text = (CONFIGS / f"cmae{ending}.yaml").read_text()
    groups = parsed(yaml.safe_load(text))
    ours, theirs = groups["mild"], groups["shifted"]
    assert ours.size == theirs.size
    assert ours.window is not None
    assert theirs.window is not None
    assert (ours.window.shift, theirs.window.of) == (0, "mild")
    assert ours.window.canvas == theirs.window.canvas
    assert not ours.photometric
    assert theirs.photometric[0].jitter == 0.8
    if not ending:
        assert (ours.window.canvas, ours.size, theirs.window.shift) == (256, 224, 31)
    plan = ours.plan("mild", 7, 300, 400)
    assert theirs.plan("shifted", 7, 300, 400, shared=plan)[0][0][:5] == plan[0][0][:5]


@pytest.mark.parametrize(
    ("window", "more", "message"),
    [
        (Window(canvas=20), {}, "size is 21 and its window has canvas 20 and shift 0"),
        (Window(canvas=28, shift=8), {}, r"canvas 28 and shift 8.*size \+ shift at most canvas"),
        (Window(canvas=28, shift=-1), {}, "shift -1"),
        (Window(canvas=28, of="mild"), {"scale": (0.5, 1.0)}, "given beside window.of: mild"),
        (Window(canvas=28, of="mild"), {"flip": 0.0}, "which decides them"),
    ],
)
def test_wrong_windows_are_told(window, more, message):
    with pytest.raises(UserError, match=message):
        Crops(size=21, window=window, **more)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"other": SHIFTED}, "shares the boxes of 'mild'; there are no others; set data.views.oth"),
        ({"mild": SHIFTED}, "view 'mild' shares the boxes of 'mild'; there are no others"),
        ({"one": WHOLE, "other": SHIFTED}, "there are one; set data.views.other.window.of"),
        (
            {
                "one": WHOLE,
                "mild": Crops(size=21, window=Window(canvas=28, of="one")),
                "other": SHIFTED,
            },
            "none of its own but those of 'one'; set data.views.other.window.of: one",
        ),
        (
            {"mild": Crops(number=2), "other": SHIFTED},
            "has 1 crops and shares the boxes of 'mild', which has 2.*data.views.other.number",
        ),
    ],
)
def test_boxes_that_are_not_there_are_told(groups, message):
    with pytest.raises(UserError, match=message):
        make(**groups)


def test_windows_are_drawn_apart_from_boxes():
    """The numbers that place a window are no others' numbers."""
    crops = Crops(size=8, window=Window(canvas=40, shift=32))
    boxes = [crops.plan("mild", key, 375, 500)[0][0] for key in range(3000)]
    corners = np.array([b.corner for b in boxes])
    rest = np.array([b[:4] for b in boxes])
    assert np.abs(np.corrcoef(corners.T, rest.T)[:2, 2:]).max() < 0.06
    assert abs(np.corrcoef(corners.T)[0, 1]) < 0.06
    assert (corners.min(), corners.max()) == (0, 32)
