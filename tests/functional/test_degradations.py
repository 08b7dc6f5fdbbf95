"""What degradations do to images, and that their draws belong to images and not to batches."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch import Tensor

from contramask.functional.degradations import Degradation, shuffle_patches, sweep
from contramask.functional.frequencies import band_mask, high_pass, low_pass, within_band
from contramask.types import UserError

B, H, W = 2, 24, 36
KEYS = ["cat/7", "dog/2"]
WORDS = ["noise20", "blur1.5", "freq0.5", "freq0.9eps0.1", "lowpass4", "highpass4", "shuffle4"]


def images(seed: int = 0, size: tuple[int, int] = (H, W), count: int = B) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def degrade(word: str, x: Tensor, keys=KEYS, **options) -> Tensor:
    return Degradation.parse(word)(x, keys, **options)


def by_the_definition(noise: np.ndarray, f: float, s: float = 0.2) -> np.ndarray:
    """Park et al.: centred spectrum, square annulus, inverse transform, real part."""
    height, width = noise.shape
    plane = np.fft.fftshift(np.fft.fft2(noise))
    kept = np.zeros((height, width))
    for sign, reach in ((1, f + s), (-1, f - s)):
        rows, columns = (
            min(max(int(reach * n / (2 * math.pi)) * 2, 0), n) for n in (height, width)
        )
        top, left = (height - rows) // 2, (width - columns) // 2
        kept[top : top + rows, left : left + columns] += sign
    return np.fft.ifft2(np.fft.ifftshift(plane * kept)).real


@pytest.mark.parametrize("f", [0.05, 0.1, 0.3, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("size", [(H, W), (32, 32), (28, 28)])
def test_band_noise_is_that_of_the_definition(f: float, size: tuple[int, int]):
    noise = torch.randn(size, generator=torch.Generator().manual_seed(3)).sign()
    expected = by_the_definition(noise.numpy().astype(np.float64), f * math.pi)
    np.testing.assert_allclose(within_band(noise, f * math.pi).numpy(), expected, atol=2e-6)


@given(st.integers(4, 23), st.integers(4, 23), st.floats(0.01, 1.0))
def test_the_mask_is_symmetric_whatever_the_size(height: int, width: int, f: float):
    mask = band_mask(height, width, f * math.pi).numpy()
    for i, j in np.ndindex(height, width):
        assert mask[i, j] == mask[-i % height, -j % width]
    assert set(np.unique(mask)) <= {0, 0.5, 1}


def test_added_band_noise_lies_in_the_annulus_and_nowhere_else():
    x, f, std = images(), 0.5, (0.2, 0.3, 0.1)
    added = (degrade("freq0.5", x, std=std) - x).numpy()
    power = np.abs(np.fft.fft2(added)) ** 2
    rows, columns = (np.abs(np.fft.fftfreq(n)) * 2 * np.pi for n in (H, W))
    distance = np.maximum(rows[:, None], columns[None])  # of a square
    low, high = f * np.pi - 0.2, f * np.pi + 0.2
    pixel = 2 * np.pi / H  # int() cuts the border down to whole cycles of each axis
    outside = (distance > high) | (distance < low - pixel)
    inside = (distance > low) & (distance < high - pixel)
    assert power[..., outside].max() < 1e-6 * power.max()
    assert power[..., inside].min() > 0
    # Of white noise of variance eps^2 the mask keeps its share, in each channel's own unit.
    share = (band_mask(H, W, f * math.pi) ** 2).mean().item()
    for channel, unit in enumerate(std):
        kept = added[:, channel].var() / (0.7 * unit) ** 2
        assert kept == pytest.approx(share, rel=0.25)


def test_band_noise_is_added_to_the_normalised_image_without_clipping():
    x, mean, std = images(), (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)
    shift, scale = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
    made = Degradation.parse("freq0.3eps3")
    found = made.of_normalised((x - shift) / scale, KEYS, mean=mean, std=std) * scale + shift
    torch.testing.assert_close(found, made(x, KEYS, std=std), rtol=0, atol=1e-5)
    assert found.min() < 0
    assert found.max() > 1


@pytest.mark.parametrize("radius", [1, 4, 7.5, 14])
def test_low_and_high_pass_add_up_to_the_image_and_its_mean(radius: float):
    x = images()
    mean = x.mean((2, 3), keepdim=True)
    low, high = degrade(f"lowpass{radius}", x), degrade(f"highpass{radius}", x)
    torch.testing.assert_close(low + high - mean, x, rtol=0, atol=2e-6)
    for part in (low, high):
        torch.testing.assert_close(part.mean((2, 3), keepdim=True), mean)
    cycles = np.hypot(np.fft.fftfreq(H, 1 / H)[:, None], np.fft.fftfreq(W, 1 / W))
    spectrum = np.fft.fft2(x.numpy())
    above = np.where(cycles <= radius, 0, spectrum)
    np.testing.assert_allclose(np.fft.fft2((high - mean).numpy()), above, atol=2e-4)
    np.testing.assert_allclose(np.fft.fft2(low.numpy()), spectrum - above, atol=2e-4)


def test_filters_of_a_wave_keep_it_or_drop_it():
    rows = torch.arange(H)[:, None] / H
    wave = (0.5 + 0.3 * torch.cos(2 * math.pi * 5 * rows)).expand(1, 3, H, W)
    torch.testing.assert_close(low_pass(wave, 5.0), wave)
    torch.testing.assert_close(low_pass(wave, 4.9), torch.full_like(wave, 0.5))
    torch.testing.assert_close(high_pass(wave, 4.9), wave)


def test_noise_has_its_sigma_and_is_clipped():
    x = torch.full((B, 3, 96, 96), 0.5)
    assert (degrade("noise20", x) - x).std().item() == pytest.approx(20 / 255, rel=0.02)
    edge = degrade("noise40", torch.zeros(B, 3, H, W))
    assert edge.min() == 0
    assert edge.max() > 0.2


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.5])
def test_blur_is_the_gaussian_of_scipy(sigma: float):
    x = images()
    reach = math.ceil(3 * sigma)
    expected = gaussian_filter(
        x.double().numpy(), sigma, axes=(2, 3), mode="mirror", radius=reach, truncate=99
    )
    np.testing.assert_allclose(degrade(f"blur{sigma}", x).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.3, 4, 40])
def test_blur_of_a_constant_is_the_constant(sigma: float):
    """Also where the kernel is longer than the image."""
    x = torch.rand(B, 3, 1, 1).expand(B, 3, 9, 14)
    torch.testing.assert_close(degrade(f"blur{sigma}", x), x.contiguous())


@pytest.mark.parametrize("grid", [2, 3, 4, 12])
def test_shuffling_moves_whole_patches_and_loses_none(grid: int):
    x = images()
    found = degrade(f"shuffle{grid}", x)

    def patches(image: Tensor) -> list[bytes]:
        h, w = H // grid, W // grid
        return [
            image[:, i : i + h, j : j + w].numpy().tobytes()
            for i in range(0, H, h)
            for j in range(0, W, w)
        ]

    for before, after in zip(x, found, strict=True):
        assert sorted(patches(before)) == sorted(patches(after))
        assert grid == 2 or patches(before) != patches(after)


def test_patches_go_where_the_order_says():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    found = shuffle_patches(x, torch.tensor([[3, 0, 1, 2]]))
    assert found[0, 0].tolist() == [[10, 11, 0, 1], [14, 15, 4, 5], [2, 3, 8, 9], [6, 7, 12, 13]]


@pytest.mark.parametrize("word", WORDS)
def test_an_image_is_degraded_alike_in_every_batch(word: str):
    x = images(count=5, size=(24, 24))
    keys = [f"k{i}" for i in range(5)]
    whole = degrade(word, x, keys)
    assert whole.shape == x.shape
    assert not torch.equal(whole, x)
    for part in ([3], [4, 1], []):
        torch.testing.assert_close(
            degrade(word, x[part], [keys[i] for i in part]), whole[part], rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("word", ["noise20", "freq0.5", "shuffle6"])
def test_draws_are_a_function_of_seed_key_and_word(word: str):
    x = images(size=(24, 24))[:1].expand(2, 3, 24, 24)
    torch.manual_seed(1)
    found = degrade(word, x, ["a", "b"])
    torch.manual_seed(2)
    assert torch.equal(found, degrade(word, x, ["a", "b"]))
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found, degrade(word, x, ["a", "b"], seed=1))
    stronger = degrade("noise40", x, ["a", "b"]) - x
    assert not torch.allclose(2 * (degrade("noise20", x, ["a", "b"]) - x), stronger, atol=1e-3)


def test_clean_changes_nothing_at_all():
    x = images()
    assert Degradation.parse("clean").of_normalised(x, KEYS, mean=(1.0,) * 3, std=(3.0,) * 3) is x


@pytest.mark.parametrize("word", ["clean", *WORDS, "noise0.5", "freq1"])
def test_a_word_says_itself_again(word: str):
    made = Degradation.parse(word)
    assert str(made) == word
    assert Degradation.parse(str(made)) == made
    assert made.about()


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("fog3", "'fog3' is none; there are clean, noise20"),
        ("noise", "'noise' is none"),
        ("clean2", "is none"),
        ("noise0", "'noise0' needs a strength above 0"),
        ("noise-3", "is none"),
        ("freq1.5", "needs f in"),
        ("freq0.5eps0", "eps above 0"),
        ("shuffle2.5", "a whole number from 2 on"),
        ("shuffle1", "a whole number from 2 on"),
    ],
)
def test_words_that_mean_nothing_are_refused(word: str, told: str):
    with pytest.raises(UserError, match=told):
        Degradation.parse(word)


def test_what_means_nothing_for_the_size_is_refused():
    with pytest.raises(UserError, match="shuffle5 needs sides that 5 divides; images have 24 x 36"):
        degrade("shuffle5", images())
    with pytest.raises(
        UserError, match=r"lowpass30 is above every frequency .* end at 21.6 cycles"
    ):
        degrade("lowpass30", images())
    degrade("highpass21", images())


@pytest.mark.parametrize("size", [32, 96, 224])
def test_the_default_sweep_means_something_at_every_size(size: int):
    words = sweep(size)
    assert words[0] == "clean"
    assert len(words) == len(set(words))
    for word in words:
        Degradation.parse(word).check(size, size)
    if size == 224:
        assert {"blur2", "blur8", "noise40", "freq0.1", "freq1", "highpass32", "shuffle8"} < set(
            words
        )
    if size == 32:
        assert "blur0.286" in words
        assert "lowpass16" not in words
