"""The classifier of fine-tuning, and how a pretrained backbone is made ready for it."""

import pytest
import torch
from torch import nn

from contramask.models.classifier import Classifier, tunable
from contramask.probes.features import features
from contramask.types import UserError
from tests.builders import randn, tiny_vit
from tests.probes.tiny import TinyBackbone

SIDE = 16  # pixels; 4 x 4 patches
IMAGES = randn(3, 3, SIDE, SIDE, seed=7)


def pretrained(**changes):
    """A square tiny ViT whose every parameter is something."""
    vit = tiny_vit(img_size=SIDE, **changes)
    for i, (name, parameter) in enumerate(vit.named_parameters()):
        if "norm" in name or "bias" in name:
            parameter.data += 0.3 * randn(*parameter.shape, seed=i)
    return vit.eval()


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_what_the_head_reads(pool):
    vit = pretrained()
    found = Classifier(vit, 5, pool=pool).features(IMAGES)
    if pool == "cls":
        expected = features(vit, IMAGES, pool="cls", norm="final")
    else:
        mean = features(vit, IMAGES, pool="mean", norm="none")
        expected = nn.functional.layer_norm(
            mean, (24,), vit.vit.norm.weight, vit.vit.norm.bias, 1e-6
        )
        assert not torch.allclose(expected, features(vit, IMAGES, pool="mean", norm="final"))
    torch.testing.assert_close(found, expected)


def test_scores_are_a_linear_layer_of_the_features():
    classifier = Classifier(pretrained(), 5)
    head = classifier.head
    expected = classifier.features(IMAGES) @ head.weight.T + head.bias
    torch.testing.assert_close(classifier(IMAGES), expected)


def test_registers_are_no_patches():
    vit = pretrained(timm={"reg_tokens": 2})
    with torch.no_grad():
        vit.vit.reg_token.fill_(50.0)
    seen = []
    vit.vit.blocks[1].register_forward_hook(lambda m, i, out: seen.append(out))
    found = Classifier(vit, 5).features(IMAGES)
    torch.testing.assert_close(found, vit.vit.norm(seen[0][:, 3:].mean(1)))


def test_a_new_head_is_a_function_of_the_seed():
    def made(seed, pool="mean"):
        classifier = Classifier(pretrained(), 700, pool=pool)
        classifier.initialise(std=2e-5, seed=seed)
        return classifier

    one = made(1)
    assert one.head.weight.std().item() == pytest.approx(2e-5, rel=0.02)
    assert one.head.weight.abs().max() < 2e-4
    assert not one.head.bias.any()
    assert torch.equal(one.head.weight, made(1).head.weight)
    assert not torch.equal(one.head.weight, made(2).head.weight)
    # The norm behind the mean is new (MAE's fc_norm); the one before the class token is not.
    assert torch.equal(one.backbone.vit.norm.weight, torch.ones(24))
    assert not one.backbone.vit.norm.bias.any()
    kept = made(1, "cls").backbone.vit.norm.weight
    assert torch.equal(kept, pretrained().vit.norm.weight)


@pytest.mark.parametrize("positions", ["learned", "sincos", "sincos_rows_first", "relative"])
def test_made_ready_it_is_the_same_network(positions):
    vit = pretrained(positions=positions, timm={"init_values": 0.1})
    state = {k: v.clone() for k, v in vit.state_dict().items()}
    ready = tunable(vit, size=SIDE, drop_path=0.3).eval()
    for found, expected in zip(ready(IMAGES)[:2], vit(IMAGES)[:2], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert all(parameter.requires_grad for parameter in ready.parameters())
    ready.requires_grad_(False).vit.patch_embed.proj.weight.zero_()
    assert all(torch.equal(v, state[k]) for k, v in vit.state_dict().items())


def test_everything_is_trained_unless_it_is_frozen():
    vit = pretrained(positions="sincos", freeze_patch_embed=True)
    assert not vit.vit.pos_embed.requires_grad
    assert all(p.requires_grad for p in tunable(vit, size=SIDE).parameters())
    frozen = tunable(vit, size=SIDE, freeze_patch_embed=True)
    still = {n for n, p in frozen.named_parameters() if not p.requires_grad}
    assert still == {"vit.patch_embed.proj.weight", "vit.patch_embed.proj.bias"}


def test_shared_relative_positions_become_a_table_for_each_block():
    vit = pretrained(positions="relative")
    ready = tunable(vit, size=SIDE)
    tables = [p for n, p in ready.named_parameters() if "relative" in n]
    assert len(tables) == 2
    for table in tables:
        assert torch.equal(table, vit.bias.relative_position_bias_table)
    assert tables[0] is not tables[1]
    again = tunable(ready, size=SIDE)  # already a table for each block
    assert torch.equal(again.bias[1].relative_position_bias_table, tables[1])


@pytest.mark.parametrize("kind", ["growing", "subset"])
def test_drop_path_grows_to_the_last_block(kind):
    vit = pretrained(drop_path=kind, timm={"depth": 5, "drop_path_rate": 0.05})
    ready = tunable(vit, size=SIDE, drop_path=0.2)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in ready.vit.blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert ready.config["timm"]["drop_path_rate"] == 0.2


@pytest.mark.parametrize("prefix", [True, False])
def test_another_size_is_resized_once(prefix):
    """As the network itself would resize its table at every forward."""
    vit = pretrained(timm={} if prefix else {"no_embed_class": True})
    images = randn(2, 3, 24, 24, seed=3)
    ready = tunable(vit, size=24).eval()
    assert ready.spec.grid == (6, 6)
    torch.testing.assert_close(ready(images).patch, vit(images).patch, rtol=0, atol=1e-6)


def test_relative_positions_of_another_size_keep_the_middle():
    vit = pretrained(positions="relative")
    ready = tunable(vit, size=24)
    old, new = vit.bias.relative_position_bias_table, ready.bias[0].relative_position_bias_table
    assert new.shape == (11 * 11 + 3, 3)
    torch.testing.assert_close(new[-3:], old[-3:])  # of the class token
    torch.testing.assert_close(new[60], old[24])  # no difference in place


def test_what_cannot_be():
    vit = pretrained()
    with pytest.raises(UserError, match=r"images of 18 pixels are no whole number of patches of 4"):
        tunable(vit, size=18)
    with pytest.raises(UserError, match=r"drop_path is 1.0; it is a probability below 1"):
        tunable(vit, size=SIDE, drop_path=1.0)
    with pytest.raises(UserError, match=r"needs a VisionTransformer, this is TinyBackbone"):
        tunable(TinyBackbone(), size=SIDE)
    with pytest.raises(UserError, match=r"the labels have 1 class"):
        Classifier(vit, 1)
    bare = pretrained(timm={"class_token": False, "global_pool": ""})
    with pytest.raises(UserError, match=r"no class token; set model.pool to mean"):
        Classifier(bare, 5, pool="cls")
    assert Classifier(bare, 5)(IMAGES).shape == (3, 5)
