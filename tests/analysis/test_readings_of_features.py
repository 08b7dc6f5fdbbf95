"""Geometry, invariance, classes: what they say is what the whole set of features says at once."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from contramask.analysis.classes import Classes
from contramask.analysis.geometry import Geometry, TokenSpectrum
from contramask.analysis.invariance import Invariance
from contramask.analysis.pictures import Pictures
from contramask.analysis.run import analyse, sample_weights
from contramask.analysis.views import transform
from contramask.functional.spectra import effective_rank, token_spectrum
from contramask.probes.features import features
from tests.builders import SIZE, randn, tiny_vit

COUNT = 23


def batches(labels: bool = True):
    """Three batches of different length."""
    images = images_of()
    for part in ((0, 9), (9, 13), (13, COUNT)):
        here = slice(*part)
        yield {
            "views": {"clean": images[None, here]},
            "label": (torch.arange(COUNT) % 4)[here] if labels else torch.full((COUNT,), -1)[here],
            "position": part[0],
            "keys": [f"photo {i}" for i in range(COUNT)][here],
        }


def images_of() -> torch.Tensor:
    """Four kinds, so that there is something to tell apart."""
    kinds = randn(4, 3, *SIZE, seed=3).repeat(6, 1, 1, 1)[:COUNT]
    return kinds + 0.8 * randn(COUNT, 3, *SIZE, seed=4)


@pytest.fixture(scope="module")
def vit():
    return tiny_vit().eval()


@pytest.fixture(scope="module")
def tokens(vit):
    """Of all images at once: after each block and after the final norm, (L, N, T, D)."""
    with torch.no_grad():
        found = vit(images_of(), layers=(0, 1))
    final = torch.cat([found.prefix, found.patch], 1)
    return torch.stack([found.layers[0], found.layers[1], final])


def test_geometry(vit, tokens):
    found = analyse(vit, batches(), {"": Geometry()}).readings
    assert found["repr/effective_rank"].axes == {
        "feature": ("cls", "mean"), "layer": ("block_00", "block_01", "final")
    }  # fmt: skip
    for f, pooled in enumerate((tokens[:, :, 0], tokens[:, :, 1:].mean(2))):
        for layer in range(3):
            x = pooled[layer].double()
            rank = effective_rank(x, eps=0.0 + 1e-12).item()
            assert found["repr/effective_rank"].value[f, layer].item() == pytest.approx(
                rank, rel=1e-4
            )
            unit = normalize(x, dim=-1)
            std = unit.std(0, correction=0).mean().item()
            assert found["repr/std"].value[f, layer].item() == pytest.approx(std, rel=1e-5)
    assert found["repr/rankme"].value == found["repr/effective_rank"].value[0, -1]
    # Pairs are taken inside batches: 36 + 6 + 45 of them.
    near = []
    for start, stop in ((0, 9), (9, 13), (13, COUNT)):
        unit = normalize(tokens[2, start:stop, 0].double(), dim=-1)
        near += torch.pdist(unit).square().mul(-2).exp().tolist()
    assert len(near) == 87
    value = found["repr/uniformity"].value[0, 2].item()
    assert value == pytest.approx(np.log(np.mean(near)), rel=1e-5)
    for layer in range(3):
        variance = tokens[layer, :, 1:].double().flatten(0, 1).var(0, correction=0)
        shares = variance.sort(descending=True).values / variance.sum()
        torch.testing.assert_close(found["repr/channel_variance"].value[layer], shares)
        top = found["repr/variance_top10"].value[layer].item()
        assert top == pytest.approx(shares[:10].sum().item())
        covariance = torch.cov(tokens[layer, :, 1:].mean(1).double().T, correction=0)
        logs = torch.linalg.svdvals(covariance).log()
        spectrum = found["repr/spectrum_image"].value[layer]
        torch.testing.assert_close(spectrum[:12], (logs - logs[0])[:12], rtol=1e-4, atol=1e-4)
    assert (
        found["repr/top_channels"].value.tolist() == variance.argsort(descending=True)[:6].tolist()
    )


def test_spectra_of_tokens(vit, tokens):
    found = analyse(vit, batches(), {"": TokenSpectrum(images=13)}).readings["repr/spectrum_token"]
    expected = torch.stack([token_spectrum(x[:13, 1:], 19).mean(0) for x in tokens[:2]])
    torch.testing.assert_close(found.value, expected, rtol=1e-4, atol=1e-4)


def test_invariance(vit):
    found = analyse(vit, batches(), {"": Invariance(images=13, crops=3)}).readings
    images, keys = images_of()[:13], [f"photo {i}" for i in range(13)]
    with torch.no_grad():
        views = {
            name: features(vit, transform(name, images, keys)).double()
            for name in ("plain", "flip", "crop_0", "crop_1", "crop_2")
        }
    pairs = {
        "invariance/flip": (views["plain"], views["flip"]),
        "invariance/crop": (views["crop_0"], views["crop_1"]),
    }
    for name, (x, y) in pairs.items():
        expected = torch.cosine_similarity(x, y).mean().item()
        assert found[name].value[0, -1].item() == pytest.approx(expected, rel=1e-5)
        # Inside batches of 9 and of 4 each with the image before it.
        other = torch.cat([part.roll(1, 0) for part in (y[:9], y[9:])])
        expected = torch.cosine_similarity(x, other).mean().item()
        assert found[f"{name}_shuffled"].value[0, -1].item() == pytest.approx(expected, rel=1e-5)
    x, y = (normalize(views[f"crop_{i}"], dim=-1) for i in range(2))
    expected = (x - y).square().sum(1).mean().item()
    assert found["repr/alignment"].value[0, -1].item() == pytest.approx(expected, rel=1e-4)
    assert 1 < found["repr/lidar"].value[0] < 12


def test_crops_are_functions_of_the_key():
    images = randn(3, 3, *SIZE)
    one = transform("crop_1", images, ["a", "b", "c"])
    assert one.shape == images.shape
    assert torch.equal(one[[2, 0]], transform("crop_1", images[[2, 0]], ["c", "a"]))
    assert not torch.equal(one, transform("crop_0", images, ["a", "b", "c"]))
    assert torch.equal(transform("flip", images, []), images.flip(-1))


def test_classes_by_depth(vit):
    metric = Classes(replicates=200)
    found = analyse(vit, batches(), {"": metric}).readings
    for name in ("class/knn", "class/ridge"):
        accuracy = found[name].value
        # The four kinds are easy for ridge; a network of random weights keeps them apart.
        assert (accuracy[1] > 0.5).all()
        assert (found[name].low <= accuracy + 1e-9).all()
        assert (accuracy <= found[name].high + 1e-9).all()
        spread = (found[name].high - found[name].low)[1, 0].item()
        p = accuracy[1, 0].item()
        normal = 2 * 1.96 * (p * (1 - p) / COUNT) ** 0.5
        assert spread == pytest.approx(normal, rel=0.5, abs=0.05)
    assert metric.predictions.scores.shape == (COUNT, 4)
    right = (metric.predictions.scores.argmax(1) == metric.predictions.label).double().mean()
    assert right.item() == pytest.approx(found["class/ridge"].value[0, -1].item())


def test_without_labels_classes_are_left_out(vit, caplog):
    assert analyse(vit, batches(labels=False), {"": Classes()}).readings == {}
    assert "no labels" in caplog.text


def test_pictures(vit):
    metric = Pictures(images=5)
    analyse(vit, batches(), {"": metric})
    assert sorted(metric.maps) == ["block_00", "block_01"]
    assert metric.maps["block_01"].shape == (5, 4, 5)
    torch.testing.assert_close(metric.maps["block_01"].sum((1, 2)), torch.ones(5))
    assert metric.tokens.shape == (5, 20, 24)
    shown = metric.shown(2, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    assert sorted(shown) == sorted(
        f"image_{i}{rest}"
        for i in range(2)
        for rest in ("", "/attention_block_00", "/attention_block_01")
    )
    plain, lit = shown["image_1"].astype(int), shown["image_1/attention_block_01"].astype(int)
    assert plain.shape == (*SIZE, 3)
    assert (lit <= plain).all()
    assert lit.sum() > 0.12 * plain.sum()


def test_the_bootstrap_knows_images_by_name():
    keys = [f"{i}" for i in range(300)]
    weights = sample_weights(keys, 50)
    assert (weights[:, 0] == 1).all()
    assert torch.equal(weights[[7, 2]], sample_weights(["7", "2"], 50))
    counts = weights[:, 1:]
    assert counts.mean().item() == pytest.approx(1, abs=0.03)
    assert counts.var().item() == pytest.approx(1, abs=0.06)


def test_a_backbone_is_as_it_was(vit):
    vit.vit.blocks[1].train()
    before = [m.training for m in vit.modules()]
    state = torch.get_rng_state()
    analyse(vit, batches(), {"a": Geometry(), "b": Invariance(images=9, crops=2)})
    assert [m.training for m in vit.modules()] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vit.modules())
    assert torch.equal(torch.get_rng_state(), state)
    vit.eval()
