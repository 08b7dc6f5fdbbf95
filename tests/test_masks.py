"""Masks: how many patches are hidden, in which shapes, and that they belong to places."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contramask.masks import RandomMasking, UnitMasking
from contramask.types import Spec, Step, UserError

GRIDS = st.tuples(st.integers(2, 6), st.integers(2, 7))
RATIO = st.floats(0.05, 0.95)
BIG = Spec(dim=12, patch=16, grid=(14, 14), depth=1)
ODD = Spec(dim=12, patch=4, grid=(4, 6), depth=1)


def draw(masking, *, name="m", batch=3, crops=2, step=None):
    return masking.sample(name, batch, crops, step or Step(5, 0.1, seed=9), "cpu")


@given(GRIDS, RATIO)
def test_every_image_hides_equally_many(grid, ratio):
    spec = Spec(dim=12, patch=4, grid=grid, depth=1)
    visible = int(spec.patches * (1 - ratio))
    if visible < 1:
        with pytest.raises(UserError, match=r"hides all .* model.masks.NAME.init_args.ratio"):
            RandomMasking(spec, ratio=ratio)
        return
    mask = draw(RandomMasking(spec, ratio=ratio))
    assert mask.hidden.shape == (6, spec.patches)
    assert (~mask.hidden).sum(1).tolist() == [visible] * 6
    assert mask.visible == visible
    assert torch.equal(mask.targets[:, 0], mask.hidden)


@given(st.tuples(st.integers(2, 4), st.integers(2, 4)), st.integers(1, 3), RATIO)
def test_units_are_hidden_whole(units, scale, ratio):
    rows, columns = (n * scale for n in units)
    spec = Spec(dim=12, patch=4, grid=(rows, columns), depth=1)
    hidden_units = math.ceil(ratio * units[0] * units[1])
    if hidden_units == units[0] * units[1]:
        with pytest.raises(UserError, match=r"hides all .* model.masks.NAME.init_args.ratio"):
            UnitMasking(spec, ratio=ratio, unit=4 * scale)
        return
    mask = draw(UnitMasking(spec, ratio=ratio, unit=4 * scale))
    for image in mask.hidden.unflatten(1, (rows, columns)):
        count = 0
        for i in range(units[0]):
            for j in range(units[1]):
                unit = image[i * scale : (i + 1) * scale, j * scale : (j + 1) * scale]
                assert unit.all() or not unit.any()
                count += int(unit.all())
        assert count == hidden_units
    assert mask.visible == (units[0] * units[1] - hidden_units) * scale**2


def test_numbers_of_the_papers():
    """MAE: 49 of 196 patches stay visible. SimMIM: 30 of 49 units of 32 pixels are hidden."""
    assert RandomMasking(BIG).visible == 49
    simmim = UnitMasking(BIG)
    assert simmim.units == (7, 7)
    assert draw(simmim).hidden.sum(1).tolist() == [30 * 4] * 6


@pytest.mark.parametrize("make", [RandomMasking, lambda s: UnitMasking(s, unit=8)])
@given(seed=st.integers(0, 2**40), index=st.integers(0, 2**40))
def test_masks_belong_to_places(make, seed, index):
    masking, here = make(ODD), Step(index, 0.3, seed)
    mask = draw(masking, step=here, batch=40).hidden
    assert torch.equal(draw(masking, step=here, batch=40).hidden, mask)
    for other in (Step(index + 1, 0.3, seed), Step(index, 0.3, seed + 1)):
        assert not torch.equal(draw(masking, step=other, batch=40).hidden, mask)
    assert not torch.equal(draw(masking, step=here, name="n", batch=40).hidden, mask)


@pytest.mark.parametrize("make", [RandomMasking, lambda s: UnitMasking(s, unit=8)])
@pytest.mark.parametrize(("parts", "size"), [(2, 4), (4, 2), (8, 1)])
def test_masks_do_not_depend_on_the_split(make, parts, size):
    """A global batch of 8 images, in micro-batches or ranks of 8, 4, 2 and 1."""
    masking = make(ODD)

    def of(row: int, batch: int) -> torch.Tensor:
        step = Step(5, 0.1, seed=9, row=row, rows=8)
        return draw(masking, batch=batch, step=step).hidden.unflatten(0, (2, batch))

    whole = of(0, 8)
    assert torch.equal(torch.cat([of(p * size, size) for p in range(parts)], 1), whole)
    assert len({tuple(h.tolist()) for h in whole.flatten(0, 1)}) > 8  # nor are they all the same


def test_crops_are_major():
    """Row v B + b of the mask is crop v of image b: one image alone draws the same."""
    masking = RandomMasking(ODD, ratio=0.5)
    hidden = draw(masking, batch=3, crops=2, step=Step(1, 0.0, rows=3)).hidden
    for image in range(3):
        alone = draw(masking, batch=1, crops=2, step=Step(1, 0.0, row=image, rows=3)).hidden
        assert torch.equal(alone, hidden[image::3])


def test_every_patch_is_hidden_equally_often():
    hidden = draw(RandomMasking(ODD, ratio=0.75), batch=4000, crops=1).hidden.float().mean(0)
    assert (hidden - 0.75).abs().max() < 5 * math.sqrt(0.75 * 0.25 / 4000)


def test_fill():
    assert RandomMasking(ODD).fill is None
    assert UnitMasking(ODD, unit=4, fill=False).fill is None
    torch.manual_seed(0)
    big = Spec(dim=5000, patch=4, grid=(4, 6), depth=1)
    for masking in (UnitMasking(big, unit=4), RandomMasking(big, fill=True)):
        fill = masking.fill.detach()
        assert fill.abs().max() <= 0.02
        # A normal distribution cut at one sigma keeps 0.5396 of its deviation.
        assert fill.std().item() == pytest.approx(0.02 * 0.5396, rel=0.03)


def test_units_with_the_smallest_noise_stay_visible():
    noise = torch.tensor([[0.3, 0.9, 0.1, 0.5, 0.2, 0.7]] * 2)
    noise[1] = noise[0].flip(0)
    units = UnitMasking(ODD, ratio=0.5, unit=8)  # 2 x 3 units of 2 x 2 patches
    mask = units.hide(noise)
    expected = torch.tensor([0, 1, 0, 1, 0, 1]).bool().unflatten(0, (2, 3))
    expected = expected.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()
    assert torch.equal(mask.hidden[0], expected)
    assert mask.visible == 12
    spec = Spec(dim=12, patch=4, grid=(2, 3), depth=1)
    mask = RandomMasking(spec, ratio=0.5).hide(noise)
    assert mask.hidden.tolist() == [[False, True, False, True, False, True],
                                    [True, False, True, False, True, False]]  # fmt: skip
    assert torch.equal(mask.targets[:, 0], mask.hidden)


@pytest.mark.parametrize("masking", [RandomMasking(ODD), UnitMasking(ODD, unit=8)])
def test_a_mask_is_that_of_its_noise(masking):
    step = Step(5, 0.1, seed=9)
    total = masking.units[0] * masking.units[1]
    noise = step.rand("mask/m", 3, 2, total).transpose(0, 1).flatten(0, 1)
    assert torch.equal(draw(masking, step=step).hidden, masking.hide(noise).hidden)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 75.0])
@pytest.mark.parametrize("kind", [RandomMasking, UnitMasking])
def test_ratio_is_a_fraction(kind, ratio):
    message = r"mask ratio is .* strictly between 0 and 1.*model.masks.NAME.init_args.ratio"
    with pytest.raises(UserError, match=message):
        kind(BIG, ratio=ratio)


@pytest.mark.parametrize("unit", [24, 8, 48, 0])
def test_unit_divides_the_image(unit):
    message = r"mask unit is .* multiple of the patch \(16\) .*224 x 224.*init_args.unit"
    with pytest.raises(UserError, match=message):
        UnitMasking(BIG, unit=unit)
