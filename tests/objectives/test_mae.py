"""MAE's target and pictures; its loss is held to the authors' tensors in tests/parity."""

import numpy as np
import pytest
import torch

from contramask.masks import RandomMasking
from contramask.objectives.mae import MAE
from contramask.types import Batch, Spec, Step, Tokens
from tests.builders import randn

SPEC = Spec(dim=8, patch=4, grid=(2, 3), depth=1)
STEP = Step(2, 0.1)


def built(**changes):
    torch.manual_seed(0)
    return MAE(SPEC, mask="random", dim=16, depth=1, heads=2, **changes)


def test_target_against_a_loop():
    image = randn(2, 3, 8, 12)
    found = built().target(image)
    for b in range(2):
        for n in range(6):
            row, column = divmod(n, 3)
            patch = image[b, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].double().numpy()
            flat = patch.transpose(1, 2, 0).ravel()  # the colour moves fastest
            expected = (flat - flat.mean()) / np.sqrt(flat.var(ddof=1) + 1e-6)
            np.testing.assert_allclose(found[b, n].numpy(), expected, atol=1e-5)


def test_a_perfect_decoder_draws_the_image():
    """What is drawn in hidden patches is the prediction, brought back to their mean and scale."""
    objective, image = built(), 2 + randn(3, 3, 8, 12)
    target = objective.target(image)
    mask = RandomMasking(SPEC, ratio=0.5).sample("random", 3, 1, STEP, "cpu")
    feats = {objective.passes[0]: Tokens(randn(3, 1, 8), randn(3, 3, 8), mask)}
    batch = Batch(views={"mild": image[None]}, label=torch.zeros(3).long(), position=0)
    objective.decoder.forward = lambda tokens: target
    assert objective(feats, batch, STEP).value == 0
    shown = objective.picture(feats, batch, STEP)
    torch.testing.assert_close(shown["reconstruction"], image, atol=1e-5, rtol=0)
    blank = shown["masked"] == 0
    pixels = mask.hidden.unflatten(1, (2, 3)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(blank, pixels[:, None].expand_as(blank))


def test_visible_patches_do_not_count():
    objective, image = built(), randn(3, 3, 8, 12)
    mask = RandomMasking(SPEC, ratio=0.5).sample("random", 3, 1, STEP, "cpu")
    feats = {objective.passes[0]: Tokens(randn(3, 1, 8), randn(3, 3, 8), mask)}
    batch = Batch(views={"mild": image[None]}, label=torch.zeros(3).long(), position=0)
    target = objective.target(image)
    objective.decoder.forward = lambda tokens: target + (~mask.hidden[..., None]).float()
    assert objective(feats, batch, STEP).value == 0
    objective.decoder.forward = lambda tokens: target + mask.hidden[..., None].float()
    assert objective(feats, batch, STEP).value.item() == pytest.approx(1)
