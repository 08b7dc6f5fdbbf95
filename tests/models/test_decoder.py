"""The decoder of masked autoencoders: every token at its place."""

import pytest
import torch

from contramask.functional.patches import sincos
from contramask.masks import RandomMasking
from contramask.models.decoder import TransformerDecoder
from contramask.types import Mask, Step, Tokens, UserError
from tests.builders import SPEC, randn


def decoder(**changes):
    torch.manual_seed(0)
    return TransformerDecoder(SPEC, 7, **{"dim": 16, "depth": 2, "heads": 4} | changes).eval()


def tokens(prefix=1, batch=3):
    mask = RandomMasking(SPEC, ratio=0.7).sample("m", batch, 1, Step(2, 0.0), "cpu")
    return Tokens(randn(batch, prefix, 24), randn(batch, 6, 24, seed=1), mask)


@pytest.mark.parametrize("prefix", [0, 1, 4])
def test_against_a_loop(prefix):
    """Image by image, patch by patch: seen ones in grid order, the mask token elsewhere."""
    net, given = decoder(), tokens(prefix)
    found, places = net(given), sincos(16, (4, 5))
    assert found.shape == (3, 20, 7)
    for b in range(3):
        seen = iter(net.embed(given.patch[b]))
        hidden = given.mask.hidden[b].tolist()
        patches = [
            (net.mask_token if hide else next(seen)) + place
            for hide, place in zip(hidden, places, strict=True)
        ]
        row = torch.cat([net.embed(given.prefix[b]), torch.stack(patches)])
        for block in net.blocks:
            row = block(row[None])[0]
        torch.testing.assert_close(found[b], net.out(net.norm(row))[prefix:], atol=2e-6, rtol=0)


def test_initialisation():
    net = decoder(dim=64)
    assert net.mask_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert not net.out.bias.any()
    limit = (6 / (64 + 192)) ** 0.5
    assert limit * 0.97 < net.blocks[0].attn.qkv.weight.abs().max() <= limit
    norms = [m for m in net.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert {m.eps for m in norms} == {1e-6}
    assert "positions" not in net.state_dict()  # a function of the sizes


def test_autocast_keeps_the_sum_in_float32():
    net, seen = decoder(), []
    net.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        net(tokens())
    assert seen == [torch.float32]


@pytest.mark.parametrize("kind", ["filled", "unmasked", "varying"])
def test_it_needs_a_pass_that_drops(kind):
    given = tokens()
    if kind == "filled":
        given = given._replace(patch=randn(3, 20, 24))
    elif kind == "unmasked":
        given = given._replace(patch=randn(3, 20, 24), mask=None)
    else:
        given = given._replace(mask=Mask(given.mask.hidden, given.mask.targets))
    with pytest.raises(UserError, match=r"where patches were dropped.*init_args.fill: false"):
        decoder()(given)
