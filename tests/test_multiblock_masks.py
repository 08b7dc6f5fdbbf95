"""I-JEPA's masks: sizes, rectangles, what a context keeps, and that they belong to places."""

import math
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contramask.masks import MultiblockMasking
from contramask.types import Spec, Step, UserError

PAPER = Spec(dim=12, patch=16, grid=(14, 14), depth=1)
ODD = Spec(dim=12, patch=4, grid=(6, 9), depth=1)
LOOSE = {"blocks": 3, "scale": (0.1, 0.3), "aspect": (0.5, 2.0), "context": (0.5, 0.9), "least": 4}


def draw(masking, *, name="m", batch=4, crops=2, step=None):
    return masking.sample(name, batch, crops, step or Step(5, 0.1, seed=9), "cpu")


def rectangle(places, size, grid, reach):
    """The patches of one block, from its two uniform numbers."""
    top, left = (int(p * (g - s + reach)) for p, g, s in zip(places, grid, size, strict=True))
    rows, columns = range(top, top + size[0]), range(left, left + size[1])
    return {r * grid[1] + c for r in rows for c in columns}


class Fixed(Random):
    """Returns the given numbers one after the other."""

    def __init__(self, *values):
        super().__init__()
        self.values = list(values)

    def random(self):
        return self.values.pop(0)


def test_sizes_of_the_paper():
    """Areas of 0.15 to 0.2 of 196 patches; large blocks are high. The context is 13 x 13."""
    sizes = MultiblockMasking(PAPER).sizes
    assert sizes(Fixed(0.0, 0.5, 0.0)) == ((5, 6), (13, 13))  # 29 patches at 0.75
    assert sizes(Fixed(1.0, 0.0, 1.0)) == ((8, 5), (13, 13))  # 39 patches at 1.5
    apart = MultiblockMasking(PAPER, linked=False).sizes
    assert apart(Fixed(0.0, 1.0, 0.0))[0] == (7, 4)  # 29 patches at 1.5


@pytest.mark.parametrize("reach", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("grid", [(6, 9), (14, 14)])
def test_against_a_loop(reach, overlap, grid):
    """Tables of uniform numbers to sets of patches, image by image."""
    spec, step = Spec(dim=12, patch=4, grid=grid, depth=1), Step(5, 0.1, seed=9)
    masking = MultiblockMasking(spec, **LOOSE, reach=reach, overlap=overlap)
    tables = {}

    class Noted(Step):
        def rand(self, name, batch, *shape, device="cpu"):
            tables[name] = super().rand(name, batch, *shape, device=device)
            return tables[name]

    chosen = []
    masking.sizes = lambda random: (
        chosen.append(MultiblockMasking.sizes(masking, random)) or chosen[0]
    )
    mask = draw(masking, batch=20, step=Noted(5, 0.1, seed=9))
    target, context = chosen[0]
    contexts = []
    for crop in range(2):
        for image in range(20):
            blocks = [
                rectangle(tables["mask/m/targets"][image, crop, t].tolist(), target, grid, reach)
                for t in range(3)
            ]
            for t, block in enumerate(blocks):
                found = mask.targets[crop * 20 + image, t].nonzero().flatten().tolist()
                assert found == sorted(block)
            attempt = 0
            while True:
                table = tables[f"mask/m/context/{attempt}"]
                seen = rectangle(table[image, crop].tolist(), context, grid, reach)
                if not overlap:
                    seen = seen.difference(*blocks[: max(3 - attempt // 20, 0)])
                if len(seen) > 4:
                    break
                attempt += 1
            contexts.append(sorted(seen))
    fewest = min(map(len, contexts))
    assert mask.visible == fewest
    for i, seen in enumerate(contexts):
        assert (~mask.hidden[i]).nonzero().flatten().tolist() == seen[:fewest]
    assert torch.equal(draw(masking, batch=20, step=step).hidden, mask.hidden)


def test_contexts_are_drawn_again_where_targets_leave_too_little():
    """Three large blocks cover nearly all; one after the other is let into the context."""
    masking = MultiblockMasking(ODD, blocks=3, scale=(0.75, 0.8), aspect=(0.7, 0.7),
                                context=(0.3, 0.3), least=14, reach=True)  # fmt: skip
    mask = draw(masking, batch=30)
    assert mask.visible > 14
    seen = ~mask.hidden
    taken = [(seen & mask.targets[:, t]).any(1) for t in range(3)]
    assert taken[2].any()  # the last block is given up first
    assert not (taken[0] & ~taken[1]).any()
    assert (
        not (taken[1] & ~taken[2]).any() or (mask.targets[:, 1] == mask.targets[:, 2]).all(1).any()
    )


@given(
    grid=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    seed=st.integers(0, 2**40),
    reach=st.booleans(),
)
def test_one_tensor_whatever_is_drawn(grid, seed, reach):
    spec = Spec(dim=12, patch=4, grid=grid, depth=1)
    options = {"scale": (0.1, 0.5), "aspect": (0.3, 3.0), "least": 1, "reach": reach}
    mask = draw(MultiblockMasking(spec, **options), step=Step(3, 0.2, seed), batch=5)
    assert mask.hidden.shape == (10, spec.patches)
    assert mask.targets.shape == (10, 4, spec.patches)
    assert (~mask.hidden).sum(1).tolist() == [mask.visible] * 10
    assert mask.visible > 1
    assert len(mask.targets.sum(2).unique()) == 1
    for block in mask.targets.flatten(0, 1).unflatten(1, grid):
        rows, columns = block.any(1), block.any(0)
        assert torch.equal(block, rows[:, None] & columns[None])
        for line in (rows, columns):  # without a gap
            inside = line.nonzero().flatten()
            assert inside[-1] - inside[0] + 1 == len(inside)


def test_blocks_reach_the_border_only_if_told():
    edges = []
    for reach in (False, True):
        masks = [draw(MultiblockMasking(PAPER, reach=reach), step=Step(i, 0.1)) for i in range(40)]
        targets = torch.cat([m.targets for m in masks]).unflatten(2, (14, 14))
        assert targets[..., 0, :].any()
        assert targets[..., :, 0].any()
        edges.append((bool(targets[..., 13, :].any()), bool(targets[..., :, 13].any())))
    assert edges == [(False, False), (True, True)]


def test_the_context_is_what_targets_leave():
    mask = draw(MultiblockMasking(PAPER), batch=50)
    assert not (~mask.hidden & mask.targets.any(1)).any()
    shared = draw(MultiblockMasking(PAPER, overlap=True), batch=50)
    assert (~shared.hidden & shared.targets.any(1)).any()
    assert shared.visible == 13 * 13


def test_masks_do_not_depend_on_the_spread():
    """Six images on one rank, or the rows of two micro-batches: sizes, places and the cut agree."""
    masking = MultiblockMasking(ODD, **LOOSE)
    whole = draw(masking, batch=6, step=Step(4, 0.1, seed=3, row=0, rows=6))
    parts = [draw(masking, batch=3, step=Step(4, 0.1, seed=3, row=r, rows=6)) for r in (0, 3)]
    assert {p.visible for p in parts} == {whole.visible}
    for field in ("hidden", "targets"):
        halves = [getattr(p, field).unflatten(0, (2, 3)) for p in parts]
        assert torch.equal(torch.cat(halves, 1).flatten(0, 1), getattr(whole, field))


def test_contexts_may_be_cut_by_the_micro_batch():
    """Then each keeps what its own smallest context allows, of the same blocks."""
    options = [MultiblockMasking(ODD, **LOOSE, cut=cut) for cut in ("batch", "update")]
    steps = [Step(7, 0.1, seed=3, row=r, rows=40) for r in (0, 20)]
    ours, common = ([draw(m, batch=20, crops=1, step=s) for s in steps] for m in options)
    assert min(m.visible for m in ours) == common[0].visible == common[1].visible
    assert ours[0].visible != ours[1].visible
    for mine, other in zip(ours, common, strict=True):
        assert torch.equal(mine.targets, other.targets)
        assert not (mine.hidden & ~other.hidden).any()


def test_steps_seeds_and_names_differ():
    masking, here = MultiblockMasking(ODD, **LOOSE), Step(4, 0.1, seed=3)
    mask = draw(masking, step=here, batch=40).hidden
    assert torch.equal(draw(masking, step=here, batch=40).hidden, mask)
    for other in (Step(5, 0.1, seed=3), Step(4, 0.1, seed=4)):
        assert not torch.equal(draw(masking, step=other, batch=40).hidden, mask)
    assert not torch.equal(draw(masking, step=here, batch=40, name="n").hidden, mask)


def test_sizes_move_from_step_to_step_and_are_common_to_a_batch():
    masking = MultiblockMasking(PAPER, aspect=(0.75, 1.5))
    areas = {int(draw(masking, step=Step(i, 0.1)).targets[0, 0].sum()) for i in range(30)}
    assert {30, 35, 36} <= areas <= {30, 35, 36, 40}
    assert all(0.12 * 196 < a < 0.24 * 196 for a in areas)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": (0.3, 0.2)}, r"mask scale is \(0.3, 0.2\).*at most 1, smaller"),
        ({"context": (0.5, 1.5)}, r"mask context is"),
        ({"aspect": (0.0, 1.0)}, r"mask aspect is \(0.0, 1.0\); it is a range above 0, smaller"),
        ({"blocks": 0}, r"0 blocks on a grid of \(14, 14\)"),
        ({"least": 169}, r"least is 169, and the smallest context block has 13 x 13"),
    ],
)
def test_wrong_options_are_told(wrong, message):
    with pytest.raises(UserError, match=message):
        MultiblockMasking(PAPER, **wrong)
    assert math.isfinite(draw(MultiblockMasking(PAPER)).visible)
