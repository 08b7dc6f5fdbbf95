"""The batched and the OpenCV photometric operations, held to torchvision's one by one."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
import torchvision
from torchvision.transforms.v2 import functional as tv

from contramask.data import photometric, photometric_host
from contramask.data.blur import gaussian_matrix
from contramask.data.crops import uniforms
from contramask.data.photometric import FIELDS, IDENTITY, Photometric
from contramask.errors import UserError

H, W = 41, 59
EVERYTHING = Photometric(
    jitter=0.8, strength=(0.8, 0.8, 0.8, 0.2), grey=0.2, blur=0.5, solarise=0.3
)


def pictures(count: int) -> torch.Tensor:
    """Smooth coloured noise with some contrast, (count, 3, H, W), 8 bits."""
    noise = torch.randn((count, 3, H, W), generator=torch.Generator().manual_seed(3))
    smooth = tv.gaussian_blur(noise, [9, 9], [2.5, 2.5]) * 260 + 120
    return (smooth + 12 * noise).clamp(0, 255).round().to(torch.uint8)


def row(**changes: float) -> list[float]:
    """A row that does nothing but what is named."""
    numbers = dict(zip(FIELDS, IDENTITY, strict=True)) | changes
    return [numbers[name] for name in FIELDS]


def on_device(image: torch.Tensor, *rows: list[float]) -> torch.Tensor:
    return photometric.apply(image, torch.tensor(rows), EVERYTHING)


def on_host(image: torch.Tensor, numbers: list[float]) -> torch.Tensor:
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    return torch.from_numpy(photometric_host.apply(pixels, numbers)).permute(2, 0, 1)


def levels(a: torch.Tensor, b: torch.Tensor) -> float:
    """The mean distance of two images in levels of 255; floats are in [0, 1]."""
    a, b = (x * 255 if x.is_floating_point() else x.float() for x in (a, b))
    return (a - b).abs().mean().item()


OPERATIONS = [
    ("brightness", 1.7, lambda x: tv.adjust_brightness(x, 1.7)),
    ("brightness", 0.3, lambda x: tv.adjust_brightness(x, 0.3)),
    ("contrast", 1.8, lambda x: tv.adjust_contrast(x, 1.8)),
    ("contrast", 0.2, lambda x: tv.adjust_contrast(x, 0.2)),
    ("saturation", 1.6, lambda x: tv.adjust_saturation(x, 1.6)),
    ("saturation", 0.0, lambda x: tv.adjust_saturation(x, 0.0)),
    ("hue", 0.17, lambda x: tv.adjust_hue(x, 0.17)),
    ("hue", -0.5, lambda x: tv.adjust_hue(x, -0.5)),
    ("grey", 1.0, lambda x: tv.rgb_to_grayscale(x, num_output_channels=3)),
    ("sigma", 0.1, lambda x: tv.gaussian_blur(x, [3, 3], [0.1, 0.1])),
    ("sigma", 1.3, lambda x: tv.gaussian_blur(x, [9, 9], [1.3, 1.3])),
    ("sigma", 2.0, lambda x: tv.gaussian_blur(x, [13, 13], [2.0, 2.0])),
]


@pytest.mark.parametrize(("name", "value", "theirs"), OPERATIONS)
def test_each_operation_is_torchvisions(name, value, theirs):
    image = pictures(1)
    expected = theirs(image.float() / 255)
    numbers = row(**{name: value})
    assert levels(expected, image) > 0.5 or value == 0.1
    torch.testing.assert_close(on_device(image, numbers), expected, atol=2e-6, rtol=0)
    assert levels(on_host(image[0], numbers), expected[0]) < (2.0 if name == "hue" else 0.6)


@pytest.mark.parametrize("taps", [3, 9, 23])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_the_blur_is_torchvisions_of_that_many_taps(taps, sigma):
    image = pictures(1)
    blur = torchvision.transforms.GaussianBlur(taps, (sigma, sigma))
    expected = blur(image.float() / 255)
    numbers = row(sigma=sigma, taps=float(taps))
    assert len(photometric_host.gaussian(sigma, taps)) == taps
    torch.testing.assert_close(on_device(image, numbers), expected, atol=2e-6, rtol=0)
    assert levels(on_host(image[0], numbers), expected[0]) < 0.6
    plain = levels(on_device(image, row(sigma=sigma)), expected)
    assert (plain > 0.5) == (sigma == 2.0 and taps < 13)  # where the kernel is cut


def test_samples_of_a_batch_may_have_kernels_of_their_own():
    images = pictures(3)
    rows = [row(sigma=2.0, taps=3.0), row(sigma=2.0), row(sigma=2.0, taps=9.0)]
    together = on_device(images, *rows)
    for n, kernel in enumerate((3, 13, 9)):
        expected = tv.gaussian_blur(images[n : n + 1].float() / 255, [kernel] * 2, [2.0, 2.0])
        torch.testing.assert_close(together[n : n + 1], expected, atol=2e-6, rtol=0)


def test_taps_are_in_the_row():
    u = uniforms(3, "taps", count=10)
    plain, cut = (Photometric(blur=1.0, taps=taps).row(u) for taps in (None, 9))
    assert dict(zip(FIELDS, cut, strict=True))["taps"] == 9
    assert plain[:-1] == cut[:-1]
    assert plain[-1] == 0


@pytest.mark.parametrize("threshold", [0.0, 90.0, 128.0, 255.0])
def test_solarisation_is_torchvisions(threshold):
    image = pictures(1)
    numbers = row(threshold=threshold)
    expected = tv.solarize(image, threshold)
    assert (on_device(image, numbers) * 255 - expected).abs().max() < 1e-3
    assert torch.equal(on_host(image[0], numbers), expected[0])


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_the_jitter_goes_in_the_drawn_order(order):
    factors = (1.5, 1.7, 0.4, 0.2)
    theirs = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    image = pictures(1)
    expected = image.float() / 255
    for which in order:
        expected = theirs[which](expected, factors[which])
    places = {f"{FIELDS[which]}_place": float(k) for k, which in enumerate(order)}
    numbers = row(**dict(zip(FIELDS, factors, strict=False)), **places)
    torch.testing.assert_close(on_device(image, numbers), expected, atol=1e-5, rtol=0)
    assert levels(on_host(image[0], numbers), expected[0]) < 2.0


def test_a_row_of_identity_changes_nothing():
    image = pictures(2)
    assert torch.allclose(on_device(image, row(), row()) * 255, image.float(), atol=1e-3)
    assert torch.equal(on_host(image[0], row()), image[0])


def test_both_implementations_agree_on_drawn_rows():
    images = pictures(64)
    rows = [list(EVERYTHING.row(uniforms(n, "agree", count=10))) for n in range(64)]
    batched = on_device(images, *rows)
    apart = [levels(on_host(images[n], rows[n]), batched[n]) for n in range(64)]
    assert np.mean(apart) < 1.0
    assert max(apart) < 3.0


def test_samples_of_a_batch_do_not_see_each_other(monkeypatch):
    images = pictures(7)
    rows = [list(EVERYTHING.row(uniforms(n, "alone", count=10))) for n in range(7)]
    monkeypatch.setattr(photometric, "CHUNK", 3)
    together = on_device(images, *rows)
    for n in range(7):
        alone = on_device(images[n : n + 1], rows[n])
        torch.testing.assert_close(together[n : n + 1], alone, atol=1e-6, rtol=0)


def test_the_device_is_never_asked_for_a_value():
    # A meta tensor has none: indexing by mask, .item() or a branch on data would raise.
    rows = torch.tensor([row()] * 5, device="meta")
    assert photometric.apply(pictures(5).to("meta"), rows, EVERYTHING).shape == (5, 3, H, W)


def test_what_is_left_out_by_its_probability_is_what_rows_leave_out():
    images = pictures(5)
    config = Photometric(jitter=0.5, grey=0.5)
    rows = torch.tensor([config.row(uniforms(n, "some", count=10)) for n in range(5)])
    torch.testing.assert_close(
        photometric.apply(images, rows, config), photometric.apply(images, rows, EVERYTHING)
    )


def test_grey_pictures_have_no_hue_to_turn():
    grey = pictures(1)[:, :1].expand(-1, 3, -1, -1).contiguous()
    numbers = row(hue=0.3)
    assert torch.allclose(on_device(grey, numbers) * 255, grey.float(), atol=1e-3)
    assert torch.equal(on_host(grey[0], numbers), grey[0])


def test_the_blur_keeps_constants_and_sums_at_the_border():
    matrix = gaussian_matrix(torch.tensor([0.0, 0.4, 2.0]), torch.zeros(3), 11)
    assert torch.equal(matrix[0], torch.eye(11))
    torch.testing.assert_close(matrix.sum(-1), torch.ones(3, 11))
    # Reflection without the end pixel: the neighbour of the first counts twice.
    kernel = photometric_host.gaussian(0.4)
    reach = len(kernel) // 2
    assert matrix[1, 0, 1].item() == pytest.approx(2 * kernel[reach + 1], abs=1e-6)
    assert matrix[2, 5, 5].item() > matrix[2, 5, 4].item() > 0


def test_rates_ranges_and_orders_are_those_of_the_configuration():
    config = Photometric(
        jitter=0.8, strength=(0.4, 1.5, 0.2, 0.1), grey=0.2, blur=0.1, solarise=0.3, threshold=99
    )
    rows = np.array([config.row(uniforms(n, "rates", count=10)) for n in range(20_000)])
    column = dict(zip(FIELDS, rows.T, strict=True))
    on = column["brightness"] != 1
    assert on.mean() == pytest.approx(0.8, abs=0.01)
    assert column["grey"].mean() == pytest.approx(0.2, abs=0.01)
    assert (column["sigma"] > 0).mean() == pytest.approx(0.1, abs=0.01)
    assert (column["threshold"] == 99).mean() == pytest.approx(0.3, abs=0.015)
    ranges = {"brightness": (0.6, 1.4), "contrast": (0, 2.5), "saturation": (0.8, 1.2)}
    for name, (low, high) in (ranges | {"hue": (-0.1, 0.1)}).items():
        drawn = np.sort((column[name][on] - low) / (high - low))
        even = np.linspace(0, 1, len(drawn))
        assert np.abs(drawn - even).max() < 0.02, name  # Kolmogorov-Smirnov: p about 1e-5
    sigma = column["sigma"][column["sigma"] > 0]
    assert 0.1 <= sigma.min() < 0.12
    assert 1.98 < sigma.max() <= 2.0
    orders = Counter(map(tuple, rows[on, 4:8]))
    assert len(orders) == 24
    assert min(orders.values()) > 0.75 * on.sum() / 24
    assert np.abs(np.corrcoef(rows[on][:, :4].T) - np.eye(4)).max() < 0.03


def test_the_ranges_are_those_of_torchvisions_jitter():
    jitter = torchvision.transforms.ColorJitter(0.4, 1.5, 0.2, 0.1)
    u = [0.0, 1 - 1e-12, 1 - 1e-12, 0.0, 1 - 1e-12, 0.5, 0.9, 0.9, 0.9, 0.9]
    b, c, s, h = Photometric(jitter=1.0, strength=(0.4, 1.5, 0.2, 0.1)).row(u)[:4]
    ends = (jitter.brightness[1], jitter.contrast[1], jitter.saturation[0], jitter.hue[1])
    assert (b, c, s, h) == pytest.approx(ends)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"jitter": 1.2}, "jitter is 1.2.*probability"),
        ({"solarise": -0.1}, "solarise is -0.1"),
        ({"strength": (0.4, 0.4, 0.2, 0.6)}, "hue at most 0.5"),
        ({"strength": (-0.4, 0.4, 0.2, 0.1)}, "at least 0"),
        ({"sigma": (2.0, 0.1)}, "smaller number first"),
        ({"sigma": (0.0, 0.1)}, "above 0"),
        ({"threshold": 300}, "0 to 255"),
        ({"taps": 8}, "taps is 8.*odd number.*set taps"),
        ({"taps": 1}, "taps is 1; .*3 or more"),
    ],
)
def test_wrong_numbers_are_told(wrong, message):
    with pytest.raises(UserError, match=message):
        Photometric(**wrong)
