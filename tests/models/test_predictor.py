"""I-JEPA's predictor, sequence by sequence; and where target blocks are."""

import pytest
import torch

from contramask.functional.patches import sincos
from contramask.models.predictor import Predictor, places
from contramask.types import Mask, Spec, Tokens, UserError
from tests.builders import randn

SPEC = Spec(dim=20, patch=4, grid=(3, 5), depth=2)
CONTEXT = [[0, 1, 2, 7], [3, 4, 9, 14]]
BLOCKS = [[[5, 6, 10], [8, 9, 13], [5, 10, 11]], [[0, 1, 5], [6, 7, 11], [10, 11, 12]]]


def mask():
    hidden = torch.ones(2, 15, dtype=torch.bool)
    targets = torch.zeros(2, 3, 15, dtype=torch.bool)
    for b in range(2):
        hidden[b, CONTEXT[b]] = False
        for t in range(3):
            targets[b, t, BLOCKS[b][t]] = True
    return Mask(hidden, targets, 4)


def tokens(**changes):
    given = {"prefix": randn(2, 2, 20), "patch": randn(2, 4, 20, seed=1), "mask": mask()}
    return Tokens(**given | changes)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Predictor(SPEC, dim=16, depth=2, heads=4)


def test_places():
    assert places(mask().targets).tolist() == BLOCKS


def test_block_by_block(net):
    """Each target block is a sequence of its own: prefix, context, mask tokens."""
    given, table = tokens(), sincos(16, SPEC.grid)
    found = net(given, places(given.mask.targets))
    assert found.shape == (2, 3, 3, 20)
    for b in range(2):
        for t in range(3):
            seen = net.embed(given.patch[b]) + table[CONTEXT[b]]
            asked = net.mask_token + table[BLOCKS[b][t]]
            row = torch.cat([net.embed(given.prefix[b]), seen, asked])[None]
            for block in net.blocks:
                row = block(row)
            expected = net.out(net.norm(row[0, -3:]))
            torch.testing.assert_close(found[b, t], expected, atol=2e-6, rtol=0)


def test_blocks_do_not_see_each_other(net):
    given = tokens()
    where = places(given.mask.targets)
    alone = net(given, where[:, 1:2])
    torch.testing.assert_close(net(given, where)[:, 1:2], alone, atol=1e-6, rtol=0)


def test_initialisation():
    net = Predictor(SPEC, dim=64, depth=2, heads=4)
    assert net.mask_token.std().item() == pytest.approx(0.02, rel=0.3)
    for name, weight in net.named_parameters():
        if weight.ndim == 2:
            assert weight.std().item() == pytest.approx(0.02, rel=0.05), name
        elif name.endswith("bias"):
            assert not weight.any()
    norms = [m for m in net.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert {m.eps for m in norms} == {1e-6}
    assert "positions" not in net.state_dict()


def test_autocast_keeps_the_sum_in_float32(net):
    seen = []
    net.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        net(tokens(), places(mask().targets))
    assert seen == [torch.float32]


@pytest.mark.parametrize("kind", ["filled", "unmasked"])
def test_it_needs_a_pass_that_drops(net, kind):
    given = tokens(patch=randn(2, 15, 20), **{"mask": None} if kind == "unmasked" else {})
    with pytest.raises(UserError, match=r"this pass drops none.*MultiblockMasking.*fill: false"):
        net(given, places(mask().targets))


def test_blocks_must_have_one_size():
    targets = mask().targets
    targets[1, 0, 14] = True
    with pytest.raises(UserError, match=r"have 3 to 4 patches.*MultiblockMasking"):
        places(targets)
    with pytest.raises(UserError, match="have 0 to 0 patches"):
        places(torch.zeros(2, 1, 15, dtype=torch.bool))
