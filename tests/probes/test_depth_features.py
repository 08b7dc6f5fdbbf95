"""Features by depth: every reader of the house means the same numbers by the same words."""

import pytest
import torch

from contramask.analysis.classes import Classes
from contramask.analysis.run import analyse
from contramask.models.vit import VisionTransformer
from contramask.probes.extraction import extract
from contramask.probes.features import (
    CLEAN,
    Feature,
    feature_set,
    features,
    patch_features,
)
from contramask.types import Batch, UserError

B, D, DEPTH, GRID = 3, 24, 5, (2, 3)


@pytest.fixture(scope="module")
def backbone():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        vit = VisionTransformer(
            "vit_tiny_patch16_224",
            img_size=(8, 12),
            patch_size=4,
            timm={"embed_dim": D, "depth": DEPTH, "num_heads": 2, "reg_tokens": 1},
        )
        torch.nn.init.normal_(vit.vit.norm.weight, 1.0, 0.3)  # a norm that does something
    return vit.eval()


@pytest.fixture
def images():
    return torch.randn(B, 3, 8, 12, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def outputs(backbone, images):
    """What every block gives, by hooks of its own."""
    found = []
    hooks = [
        block.register_forward_hook(lambda m, i, o: found.append(o.detach()))
        for block in backbone.vit.blocks
    ]
    with torch.no_grad():
        backbone(images)
    for hook in hooks:
        hook.remove()
    assert [tuple(x.shape) for x in found] == [(B, 2 + 6, D)] * DEPTH
    return found


@torch.no_grad()
def test_sources_pools_and_norms_are_what_they_say(backbone, images, outputs):
    norm = backbone.vit.norm
    cases = {
        ("last", "cls", "final"): norm(outputs[-1])[:, 0],
        ("last", "mean", "final"): norm(outputs[-1])[:, 2:].mean(1),
        ("last", "mean", "none"): outputs[-1][:, 2:].mean(1),
        ("block_01", "cls", "final"): norm(outputs[1])[:, 0],
        ("block_01", "mean", "none"): outputs[1][:, 2:].mean(1),
        ("block_4", "cls", "final"): norm(outputs[4])[:, 0],
        ("last3", "cls", "final"): torch.cat([norm(x)[:, 0] for x in outputs[2:]], 1),
        ("last2", "mean", "none"): torch.cat([x[:, 2:].mean(1) for x in outputs[3:]], 1),
        ("last4", "cls+mean", "final"): torch.cat(
            [*(norm(x)[:, 0] for x in outputs[1:]), norm(outputs[4])[:, 2:].mean(1)], 1
        ),
    }
    wanted = [Feature(*words) for words in cases]
    together = feature_set(backbone, images, wanted)
    for feature, many, expected in zip(wanted, together, cases.values(), strict=True):
        alone = features(
            backbone, images, source=feature.source, pool=feature.pool, norm=feature.norm
        )
        torch.testing.assert_close(alone, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(alone, many)
        assert alone.shape == (B, feature.width(backbone.spec))
        assert Feature.parse(str(feature)) == feature


@torch.no_grad()
def test_patches_are_the_tokens_whose_mean_is_the_feature(backbone, images, outputs):
    found = patch_features(backbone, images, source="last2", norm="none")
    assert found.shape == (B, 6, 2 * D)
    assert torch.equal(found, torch.cat([x[:, 2:] for x in outputs[3:]], 2))
    mean = features(backbone, images, source="block_02", pool="mean")
    patches = patch_features(backbone, images, source="block_02")
    torch.testing.assert_close(patches.mean(1), mean)


def test_analyses_and_probes_read_the_same_features(backbone, images):
    """One name, one number: what analyses call a block's class token is what a probe trains on."""
    batch = Batch(views={CLEAN: images[None]}, label=torch.tensor([1, 0, 2]), position=0)
    analysis = Classes()
    readings = analyse(backbone, [batch], {"classes": analysis}).readings
    layers = readings["class/knn"].axes["layer"]
    assert layers == (*(f"block_{i:02d}" for i in range(DEPTH)), "final")
    table = torch.cat(analysis.features)  # (B, pools, layers, D)
    for i, layer in enumerate(layers):
        source, norm = ("last", "final") if layer == "final" else (layer, "none")
        for j, pool in enumerate(("cls", "mean")):
            x, y = extract(backbone, [batch], feature=Feature(source, pool, norm))
            assert torch.equal(x, table[:, j, i])
            assert y.tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("final", "source is 'final'; allowed are last, last4"),
        ("last0", "source is 'last0'"),
        ("last/max", "pool"),
        ("last/cls/batch", "norm"),
        ("last/cls/none/x", "no SOURCE/POOL/NORM"),
    ],
)
def test_words_that_mean_nothing_are_refused(given, told):
    with pytest.raises(UserError, match=told):
        Feature.parse(given)


@pytest.mark.parametrize("source", ["last6", "block_05"])
def test_a_block_that_is_not_there_is_named(backbone, images, source):
    with pytest.raises(UserError, match="has 5 blocks, block_00 to block_04; set source"):
        features(backbone, images, source=source)
