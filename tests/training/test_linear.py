"""Linear evaluation under a Lightning Trainer."""

import logging

import pytest
import pytorch_lightning as pl
import torch

from contramask.probes.extraction import extract
from contramask.probes.features import Feature
from contramask.probes.linear import LinearProbe, LinearRecipe
from contramask.training.clean_loaders import CleanImages
from contramask.training.linear import LinearEvaluation
from contramask.types import UserError
from tests.probes.tiny import CLASSES, Loader, TinyBackbone, TinyData, batches

pytestmark = [
    # pytorch-lightning's own use of torch.utils._pytree
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning"),
]

RECIPE = LinearRecipe(rates=(0.03, 1.0), epochs=30, batch=16)


def trainer(**options) -> pl.Trainer:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        accelerator="cpu", use_distributed_sampler=False, num_sanity_val_steps=0, **quiet, **options
    )


def test_its_numbers_are_those_of_the_probe_on_extracted_features():
    backbone, data = TinyBackbone(), TinyData()
    module = LinearEvaluation(
        backbone, recipe=RECIPE, feature=Feature(pool="cls+mean"), transform="resize 9"
    )
    (logged, *_) = trainer().validate(module, datamodule=CleanImages(data), verbose=False)
    x, y = extract(backbone, data.clean_dataloader("train"), feature=Feature(pool="cls+mean"))
    v, w = extract(backbone, data.clean_dataloader("val"), feature=Feature(pool="cls+mean"))
    probe = LinearProbe(x.shape[1], CLASSES, recipe=RECIPE)
    probe.fit(x, y)
    assert torch.equal(module.probe.weight, probe.weight)  # bitwise: one path to features
    ranked = probe.predict(v).argsort(dim=1, descending=True)
    values = module.result["values"]
    assert values["top1"] == pytest.approx((ranked[:, 0] == w).float().mean().item())
    assert values["top5"] == pytest.approx(
        (ranked[:, :5] == w[:, None]).any(1).float().mean().item()
    )
    assert 2 / CLASSES < values["top1"] < values["top5"]
    assert values["images"] == len(w)
    assert values["rate"] in RECIPE.rates
    assert module.result["sweep"] == probe.sweep
    assert logged["linear/top1"] == pytest.approx(values["top1"])
    for fact in (
        "class token and mean of the last block",
        "resize 9",
        "SGD",
        "best of 2",
        "10% of train",
        "17 val images",
    ):
        assert fact in module.result["protocol"]


def test_the_backbone_comes_back_as_it_was_and_the_probe_can_be_saved(tmp_path):
    backbone = TinyBackbone()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    module = LinearEvaluation(backbone, recipe=RECIPE)
    trainer().validate(module, datamodule=CleanImages(TinyData()), verbose=False)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    assert backbone.training
    torch.save(module.probe.state_dict(), tmp_path / "probe.pt")
    again = LinearProbe(12, CLASSES, recipe=LinearRecipe(rates=module.probe.rates))
    again.load_state_dict(torch.load(tmp_path / "probe.pt", weights_only=True))
    assert torch.equal(again.weight, module.probe.weight)


def test_val_is_never_used_to_choose_the_rate():
    chosen = []
    for seed in (1, 2, 3):
        loaders = [Loader(batches((40, 20))), Loader(batches((9,), seed=seed))]
        module = LinearEvaluation(TinyBackbone(), recipe=RECIPE)
        trainer().validate(module, dataloaders=loaders, verbose=False)
        chosen.append((module.result["sweep"], module.probe.weight))
    assert all(sweep == chosen[0][0] and torch.equal(w, chosen[0][1]) for sweep, w in chosen)


def test_a_class_that_only_val_has_is_missed_not_fatal():
    train, val = batches((60,)), batches((9,), seed=3)
    val[0]["label"][:] = CLASSES + 1
    module = LinearEvaluation(TinyBackbone(), recipe=RECIPE)
    trainer().validate(module, dataloaders=[Loader(train), Loader(val)], verbose=False)
    assert module.result["values"]["top1"] == 0
    assert module.probe.weight.shape[2] == CLASSES + 2


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_labels_are_named(split: str):
    loaders = {"train": batches((20,)), "val": batches((9,))}
    loaders[split] = batches((20,), unlabelled=20)
    with pytest.raises(UserError, match=f"no image of {split} has a label"):
        trainer().validate(
            LinearEvaluation(TinyBackbone()),
            dataloaders=[Loader(b) for b in loaders.values()],
            verbose=False,
        )


def test_one_loader_is_too_few():
    with pytest.raises(UserError, match=r"1 loader\(s\) given; allowed are two"):
        trainer().validate(
            LinearEvaluation(TinyBackbone()), dataloaders=Loader(batches((20,))), verbose=False
        )
