"""The initialisations by their bounds and deviations."""

import math

import pytest
import timm
import torch
from torch import nn

from tests.builders import tiny_vit

D, P = 48, 4
SIZES = {"embed_dim": D, "depth": 3, "num_heads": 4, "reg_tokens": 5}


def built(init):
    return tiny_vit(init=init, timm=SIZES).vit


def uniform(weight, limit):
    top = weight.abs().max().item()
    return top <= limit and top > 0.97 * limit


def linears(vit):
    return [(n, m) for n, m in vit.named_modules() if isinstance(m, nn.Linear)]


def test_timm_is_left_alone():
    vit = tiny_vit(init="timm", seed=3)
    torch.manual_seed(3)
    other = timm.create_model(vit.config["name"], **vit.timm_arguments())
    for key, value in other.state_dict().items():
        assert torch.equal(vit.vit.state_dict()[key], value), key


def test_mae():
    vit = built("mae")
    for name, m in linears(vit):
        assert uniform(m.weight, math.sqrt(6 / (m.in_features + m.out_features))), name
        assert not m.bias.any()
    conv = vit.patch_embed.proj
    assert uniform(conv.weight, math.sqrt(6 / (3 * P * P + D)))
    assert uniform(conv.bias, 1 / math.sqrt(3 * P * P))  # the default of convolutions
    for token in (vit.cls_token, vit.reg_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.3)


def test_mocov3():
    vit = built("mocov3")
    for name, m in linears(vit):
        rows = D if "qkv" in name else m.out_features  # three matrices, not one
        assert uniform(m.weight, math.sqrt(6 / (m.in_features + rows))), name
        assert not m.bias.any()
    conv = vit.patch_embed.proj
    assert uniform(conv.weight, math.sqrt(6 / (3 * P * P + D)))
    assert not conv.bias.any()
    assert vit.cls_token.abs().max() < 1e-5


def test_simmim():
    vit = built("simmim")
    cut = 0.5396  # deviation of a normal distribution cut at one sigma
    for name, m in linears(vit):
        block = int(name.split(".")[1]) + 1
        scale = math.sqrt(2 * block) if name.endswith(("attn.proj", "fc2")) else 1.0
        assert uniform(m.weight, 0.02 / scale), name
        assert m.weight.std().item() == pytest.approx(0.02 * cut / scale, rel=0.1), name
        assert not m.bias.any()
    for weight in (vit.patch_embed.proj.weight, vit.cls_token, vit.reg_token):
        assert weight.abs().max() <= 0.02
        assert weight.std().item() == pytest.approx(0.02 * cut, rel=0.3)


@pytest.mark.parametrize("init", ["timm", "mae", "mocov3", "simmim"])
def test_norms_and_fixed_positions_survive(init):
    vit = tiny_vit(init=init, positions="sincos").vit
    assert vit.pos_embed[0, 1, :6].tolist() == [0.0] * 6  # sine of column 0
    for m in vit.modules():
        if isinstance(m, nn.LayerNorm):
            assert (m.weight == 1).all()
            assert not m.bias.any()
