"""Statistics of attention: closed forms, loops, and the authors' published code."""

import math

import numpy as np
import pytest
import torch

from contramask.functional.attention import (
    DISTANCE_EPS,
    NMI_EPS,
    among_patches,
    distance,
    diversity,
    entropy,
    head_similarity,
    mutual_information,
    pixel_distances,
    to_prefix,
)
from tests.builders import randn


def maps(*shape: int, sharp: float = 1.0, seed: int = 0) -> torch.Tensor:
    return (sharp * randn(*shape, seed=seed)).softmax(-1)


@pytest.mark.parametrize("case", ["soft4x4", "sharp4x4", "soft14x14", "identity", "uniform"])
def test_the_authors_maps(parity, case):
    stored = parity("attention_fourier")[case]
    attention = stored["attn"]
    side = math.isqrt(attention.shape[2] - 1)
    found = distance(among_patches(attention, 1, DISTANCE_EPS), (side, side), stored["patch"])
    torch.testing.assert_close(found, stored["distance"], rtol=1e-5, atol=1e-5)
    found = mutual_information(among_patches(attention, 1, NMI_EPS))
    torch.testing.assert_close(found, stored["nmi"], rtol=1e-5, atol=1e-5)


def test_the_authors_network(parity):
    stored = parity("attention_fourier")["vit"]
    for attention, far, shared in zip(
        stored["attns"], stored["distance"], stored["nmi"], strict=True
    ):
        found = distance(among_patches(attention, 1, DISTANCE_EPS), (8, 8), 8).mean().item()
        assert found == pytest.approx(far, rel=1e-5)
        found = mutual_information(among_patches(attention, 1, NMI_EPS)).mean().item()
        assert found == pytest.approx(shared, rel=1e-5, abs=1e-5)


def test_distances_in_pixels():
    found = pixel_distances((2, 3), 16)
    assert found[0].tolist() == pytest.approx([0, 16, 32, 16, 16 * 2**0.5, 16 * 5**0.5])
    torch.testing.assert_close(found, found.T)


def test_all_alike():
    uniform = torch.full((2, 3, 12, 12), 1 / 12)
    expected = pixel_distances((3, 4), 8).mean()
    torch.testing.assert_close(distance(uniform, (3, 4), 8), expected.expand(2, 3))
    torch.testing.assert_close(entropy(uniform), torch.full((2, 3), math.log(12)))
    for found in (mutual_information(uniform), diversity(uniform)):
        torch.testing.assert_close(found, torch.zeros(2, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(head_similarity(uniform), torch.ones(2))


def test_each_its_own():
    own = torch.eye(12).expand(2, 3, 12, 12)
    assert distance(own, (3, 4), 8).eq(0).all()
    assert entropy(own).eq(0).all()
    for found in (mutual_information(own), diversity(own)):
        torch.testing.assert_close(found, torch.ones(2, 3))


def test_one_key_for_all_is_collapse_and_not_nan():
    one = torch.zeros(1, 2, 6, 6)
    one[..., 4] = 1
    assert mutual_information(one).eq(0).all()
    torch.testing.assert_close(diversity(one), torch.zeros(1, 2), rtol=0, atol=1e-6)


def test_against_loops():
    attention = maps(2, 3, 7, 7, sharp=2.0)
    kept = among_patches(attention, 2)
    found = diversity(kept), head_similarity(kept), entropy(kept), to_prefix(attention, 2)
    a = attention.double().numpy()[:, :, 2:, 2:]
    a = a / a.sum(-1, keepdims=True)

    def cosine(x: np.ndarray, y: np.ndarray) -> float:
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    for b in range(2):
        heads = [
            cosine(a[b, g, q], a[b, h, q])
            for g in range(3)
            for h in range(3)
            for q in range(5)
            if g != h
        ]
        assert found[1][b].item() == pytest.approx(np.mean(heads), rel=1e-5)
        for h in range(3):
            alike = [cosine(a[b, h, p], a[b, h, q]) for p in range(5) for q in range(5) if p != q]
            assert found[0][b, h].item() == pytest.approx(1 - np.mean(alike), rel=1e-4)
            spread = [-(a[b, h, q] * np.log(a[b, h, q])).sum() for q in range(5)]
            assert found[2][b, h].item() == pytest.approx(np.mean(spread), rel=1e-5)
            for p in range(2):
                expected = attention[b, h, 2:, p].mean().item()
                assert found[3][b, h, p].item() == pytest.approx(expected)


def test_one_head_is_like_no_other_and_not_nan():
    found = head_similarity(maps(2, 1, 5, 5))
    torch.testing.assert_close(found, torch.zeros(2), rtol=0, atol=1e-6)
