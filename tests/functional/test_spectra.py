"""Frequencies, ranks and spectra: closed forms, a plain DFT, and the authors' published code."""

import math

import numpy as np
import pytest
import torch

from contramask.functional.moments import Moments
from contramask.functional.spectra import (
    FLOOR,
    FOURIER_EPS,
    covariance_rank,
    effective_rank,
    exp_entropy,
    log_amplitude,
    log_amplitudes,
    log_spectrum,
    token_spectrum,
)
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


def by_transform(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Every frequency of every image, of which the diagonal is kept."""
    image = tokens.unflatten(1, grid)
    logs = (torch.fft.fft2(image, dim=(1, 2)).abs() + FOURIER_EPS).log().mean(3)
    diagonal = logs.diagonal(dim1=1, dim2=2)[:, : (min(grid) + 1) // 2]
    return diagonal - diagonal[:, :1]


@pytest.mark.parametrize("grid", [(14, 14), (4, 6), (7, 5), (1, 3), (2, 2)])
def test_each_image_is_that_of_the_full_transform(grid):
    tokens = randn(3, grid[0] * grid[1], 11) + 2
    found = log_amplitudes(tokens, grid)
    assert found.shape == (3, (min(grid) + 1) // 2)
    torch.testing.assert_close(found, by_transform(tokens, grid), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.mean(0), log_amplitude(tokens, grid), rtol=1e-5, atol=1e-5)


def test_a_large_mean_and_low_precision_hide_no_frequency():
    tokens = (randn(2, 35, 3) + 1000).double()
    with torch.autocast("cpu", torch.bfloat16):
        found = log_amplitudes(tokens.float(), (5, 7))
    expected = by_transform(tokens.float().double(), (5, 7)).float()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_images_of_equal_tokens_have_one_frequency():
    found = log_amplitudes(torch.full((2, 20, 3), 5.0), (4, 5))
    expected = math.log(FOURIER_EPS) - math.log(100 + FOURIER_EPS)
    torch.testing.assert_close(found, torch.tensor([[0.0, expected]] * 2), rtol=1e-5, atol=0)
    assert log_amplitudes(torch.zeros(2, 20, 3), (4, 5)).eq(0).all()
    assert log_amplitudes(randn(0, 20, 3), (4, 5)).shape == (0, 2)


def test_exp_entropy_counts():
    weights = torch.tensor([[2.0, 2.0, 2.0, 2.0], [0.0, 3.0, 0.0, 0.0], [0.0] * 4])
    torch.testing.assert_close(exp_entropy(weights), torch.tensor([4.0, 1.0, 1.0]))


@pytest.mark.parametrize("shape", [(40, 7), (5, 9)])
def test_rank_from_moments_is_that_of_the_rows(shape):
    x = randn(*shape).double() * torch.linspace(0.1, 2, shape[1]) + 0.5
    moments = Moments.of(x)
    for matrix, rows in ((moments.second_moment(), x), (moments.covariance(), x - x.mean(0))):
        expected = effective_rank(rows, eps=1e-15).item()
        assert covariance_rank(matrix).item() == pytest.approx(expected, rel=1e-6)
        assert effective_rank(rows).item() == pytest.approx(expected, rel=1e-4)


def test_rank_of_what_does_not_vary():
    moments = Moments.of(torch.full((6, 4), 0.3))
    assert covariance_rank(moments.covariance()) == 1
    assert covariance_rank(moments.second_moment()).item() == pytest.approx(1)
    assert covariance_rank(torch.zeros(2, 3, 3)).tolist() == [1, 1]


def test_spectrum_is_that_of_the_published_pseudo_code():
    """Singular values of torch.cov over images, their logs, relative to the largest."""
    x = randn(3, 50, 6) * torch.linspace(0.2, 2, 6)
    found = log_spectrum(Moments.of(x).covariance(), 4)
    for i, rows in enumerate(x.double()):
        values = torch.linalg.svdvals(torch.cov(rows.T)).log()
        torch.testing.assert_close(found[i], (values - values[0])[:4], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("tokens", "channels"), [(13, 5), (6, 17)])
def test_token_spectrum_is_that_of_each_image(tokens, channels):
    x = randn(4, tokens, channels) * torch.linspace(0.2, 2, channels) + 9
    rank = min(tokens - 1, channels)
    found = token_spectrum(x, rank)
    for i, rows in enumerate(x.double()):
        values = torch.linalg.svdvals(rows - rows.mean(0))[:rank].square().log()
        torch.testing.assert_close(found[i], values - values[0], rtol=1e-8, atol=1e-8)


def test_spectra_have_a_floor():
    floor = math.log(FLOOR)
    line = randn(1, 8, 1) * randn(1, 1, 5)  # one direction, 5 channels, 7 values asked for
    torch.testing.assert_close(
        token_spectrum(line.double(), 7)[0], torch.tensor([0.0] + [floor] * 6).double()
    )
    for value in (torch.zeros(5), torch.arange(1, 6).double() / 7):  # of which the mean is rounded
        alike = token_spectrum(value.expand(2, 13, 5), 3)
        torch.testing.assert_close(alike, torch.full((2, 3), floor).double())
    assert log_spectrum(torch.zeros(4, 4), 5).tolist() == [floor] * 5
    assert token_spectrum(randn(0, 8, 5), 3).shape == (0, 3)
