"""Frequencies and ranks: closed forms, a plain DFT, and the authors' published code."""

import math

import numpy as np
import pytest
import torch

from contramask.functional.spectra import effective_rank, log_amplitude
from tests.builders import randn


def test_the_authors_frequencies(parity):
    stored = parity("attention_fourier")["fourier"]
    for kind in ("", "_odd"):
        for latents, expected in zip(
            stored[f"latents{kind}"], stored[f"result{kind}"], strict=True
        ):
            side = math.isqrt(latents.shape[1])
            found = log_amplitude(latents, (side, side))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_authors_network(parity):
    """Its latents: the embedding, then two of each block; the last output is not one of them."""
    stored = parity("attention_fourier")["vit"]
    latents = [z for z in stored["zs"] if z.ndim == 3]
    found = torch.stack([log_amplitude(z[:, 1:], (8, 8)) for z in latents])
    torch.testing.assert_close(found, stored["fourier"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found[::2, -1], stored["plotted_delta_log_amp"], rtol=1e-5, atol=1e-5
    )


def test_against_a_plain_transform():
    tokens, grid = randn(2, 12, 3), (3, 4)
    image = tokens.double().reshape(2, *grid, 3).numpy()
    expected = []
    for f in range(2):
        wave = np.exp(-2j * np.pi * (f * np.arange(3)[:, None] / 3 + f * np.arange(4)[None] / 4))
        amplitude = np.abs((image * wave[None, :, :, None]).sum((1, 2)))
        expected.append(np.log(amplitude + 1e-6).mean())
    found = log_amplitude(tokens, grid)
    np.testing.assert_allclose(found, np.array(expected) - expected[0], rtol=1e-4, atol=1e-5)


def test_rank_of_known_clouds():
    identity = torch.eye(6).repeat(3, 1)
    assert effective_rank(identity).item() == pytest.approx(6, rel=1e-4)
    line = torch.outer(randn(20), randn(6))
    assert effective_rank(line).item() == pytest.approx(1, rel=1e-4)
    assert effective_rank(torch.zeros(5, 4)).isfinite()
