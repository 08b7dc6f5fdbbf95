"""Two ranks of half the batch are one process of the whole batch."""

import pytest
import torch

from tests.builders import RECIPES
from tests.distributed.ranks import IMAGES, analyses, losses, run_two, trainings
from tests.training import tuned


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_two(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone():
    return losses()


@pytest.fixture(scope="module")
def trained():
    return trainings()


def test_gather(ranks):
    rows = torch.cat([r["kept"] for r in ranks])
    assert rows.shape == (4, 3)
    for found in ranks:
        assert found["world"] == 2
        assert torch.equal(found["gather"], rows)
        assert torch.equal(found["gathered"], rows)
        assert torch.equal(found["mean"], rows.unflatten(0, (2, 2)).mean(0))
        assert torch.equal(found["kept"], ranks[found is ranks[1]]["kept"])


def test_gradients_return_to_their_owner(ranks):
    """Each rank's loss weighs all rows; a row's gradient is the sum of what both ranks want."""
    weight = torch.arange(12.0).reshape(4, 3)
    for i, found in enumerate(ranks):
        assert torch.equal(found["gradient"], 3 * weight[2 * i : 2 * i + 2])
        # Whoever shares the gradient with the gather keeps his own.
        assert torch.equal(found["beside"], (i + 1) * weight)


@pytest.mark.parametrize("name", ["simclr", "moco"])
def test_contrastive_losses_and_gradients(ranks, alone, name):
    parts, whole = [r[name] for r in ranks], alone[name]
    loss = torch.stack([p["loss"] for p in parts])
    assert loss[0] != loss[1]
    torch.testing.assert_close(loss.mean(), whole["loss"], rtol=1e-5, atol=0)
    # DDP takes the mean of gradients, so half of each rank's counts.
    features = torch.cat([p["features"] for p in parts], 1) / 2
    limit = 1e-5 * whole["features"].abs().max().item()
    torch.testing.assert_close(features, whole["features"], rtol=0, atol=limit)
    assert len(whole["head"]) >= 2
    for key, expected in whole["head"].items():
        found = torch.stack([p["head"][key] for p in parts]).mean(0)
        limit = 1e-5 * expected.abs().max().item() + 1e-8
        torch.testing.assert_close(found, expected, rtol=0, atol=limit, msg=key)


@pytest.mark.parametrize("recipe", ["mae", "simmim", "maskfeat", "beit", "ijepa"])
def test_masked_training_is_that_of_one_process(ranks, trained, recipe):
    """Three updates of two micro-batches, masks included."""
    key = f"train/{recipe}"
    for name, expected in trained[key]["state"].items():
        torch.testing.assert_close(
            ranks[0][key]["state"][name], expected, rtol=1e-5, atol=1e-7, msg=name
        )
    whole = trained[key]["hidden"]
    assert len(whole) == 6
    for i, hidden in enumerate(whole):  # one view: images are rows
        parts = [r[key]["hidden"][i] for r in ranks]
        assert hidden.shape == (IMAGES, 20)
        assert torch.equal(torch.cat(parts), hidden)


@pytest.mark.parametrize("recipe", ["dino", "ibot"])
def test_distillation_is_that_of_one_process(ranks, trained, recipe):
    """Centres, masks of two crops and averages included."""
    key = f"train/{recipe}"
    for name, expected in trained[key]["state"].items():
        torch.testing.assert_close(
            ranks[0][key]["state"][name], expected, rtol=1e-5, atol=1e-7, msg=name
        )
    assert trained[key]["state"]["objectives.distil.centre"].any()


def test_sinkhorn_normalises_over_all_ranks(ranks, alone):
    found = torch.cat([r["sinkhorn"] for r in ranks])
    torch.testing.assert_close(found, alone["sinkhorn"])
    torch.testing.assert_close(found.sum(1), torch.ones(IMAGES))


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_ranks_agree_after_training(ranks, recipe):
    first, second = (r[f"train/{recipe}"]["state"] for r in ranks)
    assert first.keys() == second.keys()
    for name, value in first.items():
        if "running_" not in name:  # statistics are each rank's own
            assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("recipe", ["mae", "simmim", "hybrid", "hybrid_shared"])
def test_ranks_and_steps_hide_different_patches(ranks, recipe):
    first, second = (r[f"train/{recipe}"]["hidden"] for r in ranks)
    drawn = [*first, *second]
    assert len(drawn) == 12
    assert len({tuple(h.flatten().tolist()) for h in drawn}) == 12


def test_finetuning_is_that_of_one_process(ranks):
    """Erasing by image and an average of weights; without mixing, which is each rank's own."""
    whole = tuned.trained(4)
    for name, expected in whole["state"].items():
        first, second = (r["finetuning"]["state"][name] for r in ranks)
        assert torch.equal(first, second)
        torch.testing.assert_close(first, expected, rtol=1e-4, atol=2e-6, msg=name)
    assert whole["values"]["images"] == 25
    for found in ranks:
        assert found["finetuning"]["values"] == pytest.approx(whole["values"], abs=1e-5)


def test_analyses(ranks):
    whole = analyses()
    for found in ranks:
        assert found["analysed"].keys() == whole["analysed"].keys()
        assert len(found["analysed"]) > 500
        for key, expected in whole["analysed"].items():
            assert found["analysed"][key] == pytest.approx(expected, rel=1e-5, abs=2e-6), key
    # One rank by itself waits for nobody.
    assert ranks[0]["by_myself"] == pytest.approx(whole["by_myself"], rel=1e-9, abs=1e-12)
    assert not ranks[1]["by_myself"]
