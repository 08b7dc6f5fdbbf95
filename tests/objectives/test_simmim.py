"""SimMIM against its official form: a 1 x 1 convolution, a pixel shuffle and a mask of pixels."""

import pytest
import torch
import torch.nn.functional as F

from contramask.masks import UnitMasking
from contramask.objectives.simmim import SimMIM
from contramask.types import Batch, Spec, Step, Tokens
from tests.builders import randn

SPEC = Spec(dim=7, patch=4, grid=(4, 6), depth=1)
STEP = Step(2, 0.1)


@pytest.fixture
def case():
    torch.manual_seed(0)
    objective = SimMIM(SPEC, mask="units")
    mask = UnitMasking(SPEC, unit=8).sample("units", 3, 2, STEP, "cpu")
    tokens = Tokens(randn(6, 1, 7), randn(6, 24, 7, seed=1), mask)
    batch = Batch(
        views={"mild": randn(2, 3, 3, 16, 24, seed=2)}, label=torch.zeros(3).long(), position=0
    )
    return objective, {objective.passes[0]: tokens}, batch


def official(objective, tokens, image):
    # Rows of the matrix are ordered (row, column, colour); the shuffle wants (colour, row, column).
    weight = objective.decoder.weight.unflatten(0, (16, 3)).transpose(0, 1).flatten(0, 1)
    bias = objective.decoder.bias.unflatten(0, (16, 3)).T.flatten()
    grid = tokens.patch.mT.unflatten(2, SPEC.grid)
    made = F.pixel_shuffle(F.conv2d(grid, weight[..., None, None], bias), 4)
    hidden = tokens.mask.hidden.unflatten(1, SPEC.grid).float()
    mask = hidden.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    loss = ((made - image).abs() * mask).sum() / (mask.sum() + 1e-5) / 3
    return made, mask, loss


def test_loss_and_gradient(case):
    objective, feats, batch = case
    (tokens,) = feats.values()
    _, _, expected = official(objective, tokens, batch["views"]["mild"].flatten(0, 1))
    loss = objective(feats, batch, STEP).value
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    found = torch.autograd.grad(loss, objective.decoder.weight)[0]
    wanted = torch.autograd.grad(expected, objective.decoder.weight)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)


def test_picture(case):
    objective, feats, batch = case
    (tokens,) = feats.values()
    image = batch["views"]["mild"].flatten(0, 1)
    made, mask, _ = official(objective, tokens, image)
    shown = objective.picture(feats, batch, STEP)
    assert torch.equal(shown["image"], image)
    assert torch.equal(shown["masked"], image * (1 - mask))
    expected = torch.where(mask.bool(), made, image)
    torch.testing.assert_close(shown["reconstruction"], expected, atol=1e-5, rtol=0)
