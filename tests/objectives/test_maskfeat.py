"""MaskFeat: what is compared, over which patches, and the head."""

import pytest
import torch

from contramask.functional.hog import hog_of_patches
from contramask.masks import RandomMasking, VariedBlockMasking
from contramask.objectives.maskfeat import MaskFeat
from contramask.types import Batch, Spec, Step, Tokens, UserError
from tests.builders import randn

SPEC = Spec(dim=7, patch=8, grid=(2, 3), depth=1)
STEP = Step(2, 0.1)
SIZES = {"cell": 4, "bins": 5, "window": 8}


@pytest.fixture
def case():
    torch.manual_seed(0)
    objective = MaskFeat(SPEC, mask="hide", **SIZES)
    mask = RandomMasking(SPEC, ratio=0.6, fill=True).sample("hide", 3, 2, STEP, "cpu")
    tokens = Tokens(randn(6, 1, 7), randn(6, 6, 7, seed=1), mask)
    batch = Batch(
        views={"mild": randn(2, 3, 3, 16, 24, seed=2)}, label=torch.zeros(3).long(), position=0
    )
    return objective, {objective.passes[0]: tokens}, batch


def test_loss_by_a_loop(case):
    objective, feats, batch = case
    (tokens,) = feats.values()
    image = batch["views"]["mild"].flatten(0, 1)
    target = hog_of_patches(image, 8, **SIZES)
    errors = []
    for i in range(6):
        for n in range(6):
            if tokens.mask.hidden[i, n]:
                made = objective.decoder.weight @ tokens.patch[i, n] + objective.decoder.bias
                errors.append((made - target[i, n]).square().mean())
    assert len(errors) == 6 * 4
    found = objective(feats, batch, STEP).value
    torch.testing.assert_close(found, torch.stack(errors).mean())


def test_a_head_of_zeros_sees_the_length_of_histograms(case):
    """Every histogram of 5 bins has length 1, so the mean square of its numbers is 1/5."""
    objective, feats, batch = case
    torch.nn.init.zeros_(objective.decoder.weight)
    assert objective(feats, batch, STEP).value.item() == pytest.approx(1 / 5, rel=1e-5)


def test_a_batch_that_hides_nothing(case):
    objective, feats, batch = case
    whole = VariedBlockMasking(SPEC, whole=1.0).sample("hide", 3, 2, STEP, "cpu")
    feats = {reads: tokens._replace(mask=whole) for reads, tokens in feats.items()}
    loss = objective(feats, batch, STEP).value
    assert loss.item() == 0
    loss.backward()
    assert not objective.decoder.weight.grad.any()


def test_the_head_of_the_paper():
    objective = MaskFeat(Spec(dim=24, patch=16, grid=(2, 3), depth=1), mask="hide")
    assert objective.decoder.weight.shape == (108, 24)
    assert objective.decoder.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not objective.decoder.bias.any()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"cell": 3}, r"cell is 3 pixels and the patch 8.*init_args.cell"),
        ({"window": 32}, r"window is 32 pixels and the image 16 x 24"),
    ],
)
def test_sizes_that_do_not_divide(sizes, message):
    with pytest.raises(UserError, match=message):
        MaskFeat(SPEC, mask="hide", **SIZES | sizes)


def test_picture(case):
    objective, feats, batch = case
    (tokens,) = feats.values()
    shown = objective.picture(feats, batch, STEP)
    pixels = tokens.mask.hidden.unflatten(1, (2, 3)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert torch.equal(shown["masked"] == 0, pixels[:, None].expand_as(shown["masked"]))
