"""The backbone: timm's numbers without masks; dropping, filling, sizes, positions with them."""

import math

import pytest
import timm
import torch

from contramask.functional.patches import sincos
from contramask.masks import RandomMasking
from contramask.models.vit import VisionTransformer
from contramask.types import Mask, Step, UserError
from tests.builders import SPEC, randn, tiny_vit

KINDS = [
    {},
    {"reg_tokens": 3},
    {"reg_tokens": 3, "no_embed_class": True},
    {"init_values": 0.1},
    {"pre_norm": True},
    {"qkv_bias": False, "mlp_ratio": 2.0},
    {"class_token": False, "global_pool": ""},
]


def joined(tokens):
    return torch.cat([tokens.prefix, tokens.patch], 1)


def random_mask(ratio=0.6, batch=2, spec=SPEC):
    return RandomMasking(spec, ratio=ratio).sample("m", batch, 1, Step(3, 0.1), "cpu")


def shaken(backbone):
    """Zeros and ones of the initialisation hide mistakes: move every parameter."""
    with torch.no_grad():
        for i, parameter in enumerate(backbone.parameters()):
            parameter.add_(0.1 * randn(*parameter.shape, seed=i))
    return backbone


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_without_mask_it_is_timm(kind):
    backbone, x = shaken(tiny_vit(timm=kind)).eval(), randn(2, 3, 16, 20)
    tokens = backbone(x)
    assert torch.equal(joined(tokens), backbone.vit.forward_features(x))
    assert tokens.patch.shape == (2, 20, 24)
    assert tokens.prefix.shape[1] == backbone.vit.num_prefix_tokens
    assert tokens.mask is None
    nothing = torch.zeros(2, 20).bool()
    for fill in (None, torch.ones(24)):  # hiding nothing, either way
        same = backbone(x, Mask(nothing, nothing[:, None], 20), fill)
        torch.testing.assert_close(joined(same), joined(tokens), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_dropped_patches_are_as_if_never_attended_to(kind):
    """The same tokens, fewer: all tokens run, but nobody may look at the hidden ones."""
    backbone, x, mask = shaken(tiny_vit(timm=kind)).eval(), randn(2, 3, 16, 20), random_mask()
    found, vit = backbone(x, mask), backbone.vit
    assert found.patch.shape == (2, 8, 24)
    dense = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
    r = vit.num_prefix_tokens
    seen = torch.cat([torch.ones(2, r).bool(), ~mask.hidden], 1)[:, None, None]
    for block in vit.blocks:
        dense = block(dense, attn_mask=seen)
    dense = vit.norm(dense)
    torch.testing.assert_close(found.prefix, dense[:, :r], atol=2e-6, rtol=0)
    expected = torch.stack([d[r:][~h] for d, h in zip(dense, mask.hidden, strict=True)])
    torch.testing.assert_close(found.patch, expected, atol=2e-6, rtol=0)


def test_dropped_pixels_do_not_matter():
    backbone, x, mask = tiny_vit().eval(), randn(2, 3, 16, 20), random_mask()
    hidden = mask.hidden.unflatten(1, (4, 5)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    other = torch.where(hidden[:, None], randn(2, 3, 16, 20, seed=1), x)
    for fill in (None, torch.zeros(24)):
        assert torch.equal(joined(backbone(x, mask, fill)), joined(backbone(other, mask, fill)))
    assert not torch.equal(joined(backbone(x)), joined(backbone(other)))


def test_fill_touches_hidden_inputs_only():
    """A fill that is the embedding of what stands there changes nothing."""
    backbone, x, mask = shaken(tiny_vit()).eval(), randn(2, 3, 16, 20), random_mask()
    hidden = mask.hidden.unflatten(1, (4, 5)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    grey = torch.where(hidden[:, None], torch.tensor(0.3), x)
    weight, bias = backbone.vit.patch_embed.proj.weight, backbone.vit.patch_embed.proj.bias
    fill = 0.3 * weight.sum((1, 2, 3)) + bias
    found = joined(backbone(grey, mask, fill))
    torch.testing.assert_close(found, joined(backbone(grey)), atol=2e-6, rtol=0)
    other = fill + randn(24)  # a constant would vanish in the norms
    assert not torch.allclose(joined(backbone(grey, mask, other)), found, atol=1e-2)
    assert found.shape == (2, 21, 24)


def test_gradients_of_fill_and_of_every_parameter():
    backbone, fill = tiny_vit(timm={"reg_tokens": 2}), torch.zeros(24, requires_grad=True)
    joined(backbone(randn(2, 3, 16, 20), random_mask(), fill)).square().sum().backward()
    assert fill.grad.abs().sum() > 0
    assert not [n for n, p in backbone.named_parameters() if p.grad is None]


@pytest.mark.parametrize("masked", [False, True])
def test_intermediate_layers_are_timm_s(masked):
    backbone, x = shaken(tiny_vit(timm={"depth": 3, "reg_tokens": 2})).eval(), randn(2, 3, 16, 20)
    tokens = backbone(x, random_mask() if masked else None, layers=(0, 2))
    assert set(tokens.layers) == {0, 2}
    if masked:
        assert {v.shape for v in tokens.layers.values()} == {(2, 3 + 8, 24)}
        torch.testing.assert_close(backbone.vit.norm(tokens.layers[2]), joined(tokens))
        return
    expected = backbone.vit.forward_intermediates(
        x, [0, 2], norm=False, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )
    for layer, (patch, prefix) in zip((0, 2), expected, strict=True):
        assert torch.equal(tokens.layers[layer], torch.cat([prefix, patch], 1))


@pytest.mark.parametrize("kind", [{}, {"reg_tokens": 3}, {"no_embed_class": True}], ids=str)
@pytest.mark.parametrize("size", [(8, 24), (24, 8), (16, 16)])
def test_other_crop_sizes(kind, size):
    """Positions are resampled as timm does for images of any size."""
    backbone, x = shaken(tiny_vit(timm=kind)).eval(), randn(2, 3, *size)
    arguments = backbone.timm_arguments() | {"dynamic_img_size": True}
    other = timm.create_model(backbone.config["name"], **arguments).eval()
    other.load_state_dict(backbone.vit.state_dict())
    torch.testing.assert_close(joined(backbone(x)), other.forward_features(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", [{}, {"reg_tokens": 2}, {"no_embed_class": True}], ids=str)
@pytest.mark.parametrize("rows_first", [False, True])
def test_fixed_positions(kind, rows_first):
    name = "sincos_rows_first" if rows_first else "sincos"
    backbone = tiny_vit(positions=name, timm=kind)
    table = backbone.vit.pos_embed
    assert not table.requires_grad
    prefix = table.shape[1] - 20
    assert prefix == (0 if "no_embed_class" in kind else 1 + kind.get("reg_tokens", 0))
    assert not table[0, :prefix].any()
    grid = table[0, prefix:].unflatten(0, (4, 5))
    assert torch.equal(grid.flatten(0, 1), sincos(24, (4, 5), rows_first=rows_first))
    by_row, by_column = grid.chunk(2, -1) if rows_first else grid.chunk(2, -1)[::-1]
    assert (by_row == by_row[:, :1]).all()
    assert (by_column == by_column[:1]).all()
    assert by_row[3, 0, 0].item() == pytest.approx(math.sin(3), abs=1e-6)


def test_frozen_patch_embedding():
    backbone = tiny_vit(freeze_patch_embed=True)
    joined(backbone(randn(2, 3, 16, 20))).square().sum().backward()
    without = {n for n, p in backbone.named_parameters() if p.grad is None}
    assert without == {"vit.patch_embed.proj.weight", "vit.patch_embed.proj.bias"}


def test_drop_path_grows_to_its_rate():
    backbone = tiny_vit(timm={"depth": 3, "drop_path_rate": 0.2})
    found = [getattr(b.drop_path1, "drop_prob", 0.0) for b in backbone.vit.blocks]
    assert found == pytest.approx([0.0, 0.1, 0.2])
    x = randn(5, 3, 16, 20)
    assert not torch.equal(backbone(x).cls, backbone(x).cls)
    assert torch.equal(backbone.eval()(x).cls, backbone(x).cls)


def test_it_is_described_by_its_arguments():
    backbone = shaken(tiny_vit(timm={"reg_tokens": 2}, positions="sincos")).eval()
    again = VisionTransformer(**backbone.config).eval()
    again.load_state_dict(backbone.state_dict())
    other = timm.create_model(backbone.config["name"], **backbone.timm_arguments()).eval()
    other.load_state_dict(backbone.vit.state_dict())
    x = randn(2, 3, 16, 20)
    assert torch.equal(again(x).cls, backbone(x).cls)
    assert torch.equal(other(x), backbone(x).cls)
    assert backbone.spec == SPEC


def test_every_norm_has_the_papers_epsilon():
    norms = [m for m in tiny_vit().modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 5
    assert {m.eps for m in norms} == {1e-6}


ARGUMENTS = {"embed_dim": 24, "depth": 2, "num_heads": 3}
MISTAKES = [
    (
        {"name": "vit_smal_patch16_224"},
        r"'vit_smal_patch16_224'; near: vit_small_patch16_224,.*set",
    ),
    ({"name": "zzz"}, r"no model 'zzz'; near: none"),
    ({"name": "resnet18"}, r"cannot build resnet18.*img_size.*set model.backbone.init_args.name"),
    ({"name": "beit_base_patch16_224", "timm": ARGUMENTS}, "has a Beit; contramask trains timm's"),
    (
        {"name": "deit_tiny_distilled_patch16_224", "timm": ARGUMENTS},
        "has a VisionTransformerDistilled",
    ),
    ({"timm": {"depht": 3}}, r"unexpected keyword argument 'depht'.*init_args.name.*timm"),
    ({"timm": {"embed_dim": 25, "num_heads": 3}}, r"divisible by num_heads; given .*25"),
    ({"timm": {"patch_drop_rate": 0.5}}, r"patch_drop_rate .*set a mask that drops"),
    ({"timm": {"img_size": 64}}, r"img_size .*set model.backbone.init_args.img_size"),
    ({"timm": {"global_pool": "avg"}}, r"global_pool is 'avg'; tokens are pooled by those who"),
    ({"timm": {"class_token": False}}, "Token pooling needs the class token"),
    ({"img_size": 20, "patch_size": 16}, r"20 x 20 pixels are no whole number of patches of 16"),
    ({"img_size": (32, 40), "patch_size": 16}, r"32 x 40 pixels.*img_size or patch_size"),
    ({"img_size": 8, "patch_size": 16}, r"8 x 8 pixels"),
    ({"patch_size": 0}, r"zero.*patch_size"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=lambda x: str(x)[:40])
def test_mistakes_are_told_in_a_line(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        VisionTransformer(**{"name": "vit_tiny_patch16_224", "img_size": 32} | changes)
    assert "\n" not in str(caught.value)
