"""Relative positions against a loop over pairs of patches and against timm's BEiT."""

import pytest
import timm
import torch

from contramask.masks import RandomMasking
from contramask.types import Step, UserError
from tests.builders import SPEC, randn, tiny_vit


@pytest.fixture
def backbone():
    backbone = tiny_vit(positions="relative", timm={"init_values": 0.1})
    with torch.no_grad():
        table = backbone.bias.relative_position_bias_table
        table.copy_(randn(*table.shape, seed=1))
    return backbone.eval()


def test_it_starts_at_nothing():
    assert not tiny_vit(positions="relative").bias.relative_position_bias_table.any()


def test_bias_against_a_loop(backbone):
    """One number per head and difference of places; three more for the class token."""
    table, (rows, columns) = backbone.bias.relative_position_bias_table, SPEC.grid
    assert table.shape == (7 * 9 + 3, 3)
    bias = backbone.bias.get_bias()
    assert bias.shape == (1, 3, 21, 21)
    for i in range(20):
        for j in range(20):
            down = i // columns - j // columns + rows - 1
            right = i % columns - j % columns + columns - 1
            expected = table[down * (2 * columns - 1) + right]
            assert torch.equal(bias[0, :, 1 + i, 1 + j], expected)
    assert (bias[0, :, 0, 1:] == table[63][:, None]).all()  # from the class token
    assert (bias[0, :, 1:, 0] == table[64][:, None]).all()  # to it
    assert torch.equal(bias[0, :, 0, 0], table[65])


def test_it_is_beit(backbone):
    """timm's BEiT has separate query and value biases and no bias of keys, which do not matter."""
    beit = timm.create_model(
        "beit_base_patch16_224",
        img_size=(16, 20),
        patch_size=4,
        embed_dim=24,
        depth=2,
        num_heads=3,
        init_values=0.1,
        use_abs_pos_emb=False,
        use_rel_pos_bias=False,
        use_shared_rel_pos_bias=True,
        num_classes=0,
        global_pool="token",
    ).eval()
    for i, parameter in enumerate(backbone.vit.parameters()):
        parameter.data.add_(0.1 * randn(*parameter.shape, seed=i))
    state = beit.state_dict()
    for key, value in backbone.vit.state_dict().items():
        key = key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        if key.endswith("qkv.bias"):
            q, _, v = value.chunk(3)
            state[key.replace("qkv", "q").replace(".q.", ".q_")] = q
            state[key.replace("qkv", "v").replace(".v.", ".v_")] = v
        else:
            state[key] = value
    key = "rel_pos_bias.relative_position_bias_table"
    state[key] = backbone.bias.relative_position_bias_table.detach()
    beit.load_state_dict(state)
    x = randn(2, 3, 16, 20)
    tokens = backbone(x)
    found = torch.cat([tokens.prefix, tokens.patch], 1)
    torch.testing.assert_close(found, beit.forward_features(x), atol=5e-6, rtol=0)


def test_filled_and_under_autocast(backbone):
    mask = RandomMasking(SPEC, ratio=0.5).sample("m", 2, 1, Step(0, 0.0), "cpu")
    x, fill = randn(2, 3, 16, 20), torch.zeros(24)
    exact = backbone(x, mask, fill).cls
    with torch.autocast("cpu", torch.bfloat16):
        found = backbone(x, mask, fill).cls
    torch.testing.assert_close(found.float(), exact, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("what", ["dropped patches", "a grid of"])
def test_they_know_the_whole_grid_only(backbone, what):
    mask = RandomMasking(SPEC, ratio=0.5).sample("m", 2, 1, Step(0, 0.0), "cpu")
    drop = what == "dropped patches"
    x = randn(2, 3, 16, 20 if drop else 16)
    with pytest.raises(UserError, match=rf"relative knows the whole grid of \(4, 5\).*{what}"):
        backbone(x, mask if drop else None)


def test_registers_have_no_place():
    with pytest.raises(UserError, match="one class token and no registers, the model has 3 prefix"):
        tiny_vit(positions="relative", timm={"reg_tokens": 2})
