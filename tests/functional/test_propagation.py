"""Labels that patches take from patches, against loops and Pillow."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from contramask.functional.propagation import (
    labels_on_grid,
    mask_of_labels,
    propagate,
    window,
)
from contramask.types import UserError

GRID, N, D, C, L = (4, 5), 20, 6, 3, 4


def drawn(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    target = F.normalize(torch.randn(N, D, generator=g), dim=-1)
    context = F.normalize(torch.randn(C, N, D, generator=g), dim=-1)
    return target, context, torch.rand(C, N, L, generator=g).softmax(-1)


def by_loops(target, context, labels, radius: int, topk: int, temperature: float) -> np.ndarray:
    """The definition, one target patch at a time, in double precision."""
    target, context, labels = (x.double().numpy() for x in (target, context, labels))
    found = np.zeros((N, L))
    for n in range(N):
        row, column = divmod(n, GRID[1])
        near = []
        for c in range(C):
            for m in range(N):
                r, k = divmod(m, GRID[1])
                if radius and (abs(r - row) > radius or abs(k - column) > radius):
                    continue
                near.append((math.exp(target[n] @ context[c, m] / temperature), c, m))
        best = sorted(near, reverse=True)[:topk]
        for weight, c, m in best:
            found[n] += weight * labels[c, m] / sum(w for w, _, _ in best)
    return found


@pytest.mark.parametrize("radius", [0, 1, 2, 12])
@pytest.mark.parametrize("topk", [1, 5, 19, C * N])
def test_labels_are_those_of_the_definition(radius: int, topk: int):
    found = propagate(*drawn(), grid=GRID, radius=radius, topk=topk, temperature=0.2)
    np.testing.assert_allclose(found, by_loops(*drawn(), radius, topk, 0.2), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("elements", [1, 3 * C * N, 7 * C * N + 5])
def test_slices_change_nothing(elements: int):
    whole = propagate(*drawn(), grid=GRID, radius=2)
    torch.testing.assert_close(
        propagate(*drawn(), grid=GRID, radius=2, elements=elements), whole, rtol=1e-5, atol=1e-7
    )


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(0, 4), st.integers(1, 9))
def test_probabilities_stay_probabilities(seed: int, radius: int, topk: int):
    found = propagate(*drawn(seed), grid=GRID, radius=radius, topk=topk)
    assert found.min() >= 0
    torch.testing.assert_close(found.sum(1), torch.ones(N))


def test_patches_that_tie_for_the_last_place_all_count():
    target, context, labels = drawn()
    context[:] = context[0, 0]
    found = propagate(target, context, labels, grid=GRID, radius=0, topk=2)
    torch.testing.assert_close(found, labels.mean((0, 1)).expand(N, L))


def test_a_tiny_temperature_is_the_nearest_patch():
    target, context, labels = drawn()
    found = propagate(target, context, labels, grid=GRID, radius=0, temperature=1e-4)
    nearest = (target @ context.flatten(0, 1).T).argmax(1)
    torch.testing.assert_close(found, labels.flatten(0, 1)[nearest])


def test_bfloat16_of_autocast_does_not_reach_it():
    with torch.autocast("cpu", torch.bfloat16):
        found = propagate(*drawn(), grid=GRID)
    assert torch.equal(found, propagate(*drawn(), grid=GRID))


def test_a_window_by_hand():
    near = window(torch.tensor([0, 12]), (4, 5), 1).view(2, 4, 5)
    assert near[0].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert near[1].nonzero().tolist() == [[r, c] for r in (1, 2, 3) for c in (1, 2, 3)]


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"topk": 0}, "topk is 0; the context has 60 patches"),
        ({"topk": 61}, "topk lies in 1..60"),
        ({"radius": -1}, "radius is -1"),
        ({"temperature": 0.0}, "temperature 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(setting: dict, told: str):
    with pytest.raises(UserError, match=told):
        propagate(*drawn(), grid=GRID, **setting)


@pytest.mark.parametrize("size", [(30, 40), (31, 43), (8, 10)])
def test_labels_on_the_grid_are_pillows_nearest(size: tuple[int, int]):
    pixels = np.random.default_rng(0).choice([0, 2, 7, 9, 255], size).astype(np.uint8)
    found = labels_on_grid(torch.from_numpy(pixels), torch.tensor([2, 9]), GRID)
    small = np.asarray(Image.fromarray(pixels).resize(GRID[::-1], Image.Resampling.NEAREST))
    for n, index in enumerate(small.flatten()):
        expected = {2: [0, 1, 0], 9: [0, 0, 1]}.get(int(index), [1, 0, 0])
        assert found[n].tolist() == expected


def test_a_mask_comes_back_from_its_labels():
    """An object of whole patches: bilinear edges lie between its patches' centres and the next."""
    mask = torch.zeros(4 * 8, 5 * 8, dtype=torch.uint8)
    mask[8:24, 16:32] = 7
    mask[8:24, :8] = 3
    objects = torch.tensor([3, 7])
    labels = labels_on_grid(mask, objects, GRID)
    found = mask_of_labels(labels, objects, grid=GRID, patch=8, size=(32, 40))
    assert set(found.unique().tolist()) == {0, 3, 7}
    for index in (3, 7):
        a, b = found == index, mask == index
        assert (a & b).sum() / (a | b).sum() > 0.9


def test_masks_by_numpy_and_pillow():
    """Bilinear by Pillow's float mode, stretched, largest, nearest."""
    labels = torch.rand(N, L, generator=torch.Generator().manual_seed(3)).softmax(1)
    objects, size = torch.tensor([4, 5, 200]), (32, 64)
    found = mask_of_labels(labels, objects, grid=GRID, patch=6, size=size)
    maps = []
    for channel in labels.T:
        image = Image.fromarray(channel.view(GRID).numpy())
        large = np.asarray(image.resize((GRID[1] * 6, GRID[0] * 6), Image.Resampling.BILINEAR))
        maps.append((large - large.min()) / (large.max() - large.min()))
    index = np.array([0, 4, 5, 200], np.uint8)[np.argmax(maps, axis=0)]
    expected = Image.fromarray(index).resize(size[::-1], Image.Resampling.NEAREST)
    assert np.array_equal(found.numpy(), expected)


def test_an_object_that_is_nowhere_is_not_drawn():
    labels = torch.zeros(N, 3)
    labels[:, 0] = 1
    found = mask_of_labels(labels, torch.tensor([1, 2]), grid=GRID, patch=2, size=(8, 10))
    assert not found.any()
