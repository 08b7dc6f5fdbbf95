"""Linear probes that learn from augmented views under a Lightning Trainer."""

from dataclasses import replace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from contramask.callbacks.checkpoint import Checkpoints
from contramask.checkpoints.files import load, newest
from contramask.probes.features import CLEAN, Feature, feature_set
from contramask.probes.linear import LinearProbe, LinearRecipe
from contramask.training.augmented_images import VIEW
from contramask.training.head_scores import Table, held_out
from contramask.training.linear_augmented import LinearAugmented
from contramask.types import UserError
from tests.probes.tiny import CLASSES, TinyBackbone
from tests.training.augmented_toys import SAMPLES, VAL, Toys
from tests.training.test_linear import trainer

pytestmark = [
    # pytorch-lightning's own use of torch.utils._pytree
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning"),
    # its processes are forked, which is the quickest way to have two
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

ONE = LinearRecipe(rates=(2.0,), epochs=2, batch_norm=False)
SWEEP = replace(ONE, rates=(1e-3, 30.0), holdout=0.3, per_epoch=True)
NORMED = replace(ONE, optimiser="lars", batch_norm=True, warmup=0.25, rates=(0.5,))
ADAM = replace(SWEEP, optimiser="adamw", weight_decay=0.1, rates=(0.1, 1.0))
TWO = (Feature(pool="mean"), Feature(pool="cls+mean"))


def module(
    recipe: LinearRecipe = ONE, features: tuple[Feature, ...] = TWO[:1], batch: int = 10
) -> LinearAugmented:
    return LinearAugmented(
        TinyBackbone(), recipe=recipe, features=features, classes=CLASSES, samples=SAMPLES,
        batch_size=batch,
    )  # fmt: skip


def coach(**options: Any) -> pl.Trainer:
    return trainer(
        **{"max_epochs": -1, "enable_checkpointing": False, "log_every_n_steps": 2} | options
    )


def learned(recipe: LinearRecipe, features: tuple[Feature, ...] = TWO[:1], **data: Any):
    found = module(recipe, features)
    coach().fit(found, datamodule=Toys(choose=found.several, **data))
    return found


def state(probe: LinearAugmented) -> dict[str, torch.Tensor]:
    return {k: v for k, v in probe.state_dict().items() if k.startswith("probes.")}


def held(recipe: LinearRecipe):
    return lambda key: held_out(key, recipe.holdout, seed=recipe.seed)


@pytest.mark.parametrize("recipe", [ONE, NORMED, SWEEP, ADAM])
def test_heads_learn_from_the_views_of_the_stream_and_nothing_else(recipe: LinearRecipe):
    """The same by a loop: 14 steps of 10 views in two epochs of 70 images."""
    found = learned(recipe, TWO)
    data, backbone = Toys(), TinyBackbone().eval()
    probes = [
        LinearProbe(f.width(backbone.spec), CLASSES, recipe=recipe, steps=14, resumable=True)
        for f in TWO
    ]
    left_out = 0
    for step in range(14):
        batch = data.views(10 * step)
        used = torch.tensor([not held(recipe)(key) for key in batch.get("keys", [])])
        left_out += int((~used).sum())
        with torch.no_grad():
            rows = feature_set(backbone, batch["views"][VIEW][0][used], TWO)
        for probe, x in zip(probes, rows, strict=True):
            probe.learn(x, batch["label"][used], batch=10)
    assert left_out > 0  # two features are two heads, so there is something to choose
    assert found.steps == 14
    for i, probe in enumerate(probes):
        for name, value in probe.state_dict().items():
            assert torch.equal(state(found)[f"probes.{i}.{name}"], value), name


def test_one_head_learns_from_all_images():
    found, backbone = learned(ONE), TinyBackbone().eval()
    probe = LinearProbe(12, CLASSES, recipe=ONE, steps=14)
    for step in range(14):
        batch = Toys().views(10 * step)
        with torch.no_grad():
            (x,) = feature_set(backbone, batch["views"][VIEW][0], TWO[:1])
        probe.learn(x, batch["label"])
    assert torch.equal(found.heads[0].weight, probe.weight)


def test_images_held_out_do_not_train():
    """Other labels on them, and the heads are bitwise the same; on all images they are not."""
    as_they_are = learned(SWEEP)
    others = learned(SWEEP, held=0, is_held=held(SWEEP))
    assert sum(map(held(SWEEP), (f"image-{i}" for i in range(SAMPLES)))) > 10
    for name, value in state(as_they_are).items():
        assert torch.equal(value, state(others)[name]), name
    wrong = learned(SWEEP, held=0, is_held=lambda key: not held(SWEEP)(key))
    assert not torch.equal(as_they_are.heads[0].weight, wrong.heads[0].weight)


def test_the_part_held_out_is_as_large_as_it_should_be_and_hangs_on_name_and_seed():
    names = [f"shard/{i}" for i in range(5000)]
    parts = [
        {n for n in names if held_out(n, f, seed=s)} for f, s in ((0.1, 0), (0.1, 1), (0.4, 0))
    ]
    assert len(parts[0]) == pytest.approx(500, abs=80)
    assert len(parts[2]) == pytest.approx(2000, abs=140)
    assert parts[0] < parts[2]
    assert len(parts[0] & parts[1]) == pytest.approx(50, abs=30)


def test_the_head_is_chosen_on_train_and_scored_on_val():
    found = learned(SWEEP, TWO)
    coach().test(found, datamodule=Toys(), verbose=False)
    result, scored = found.result, {}
    data, backbone = Toys(), TinyBackbone().eval()
    data.trainer = coach()
    for split in ("train", "val"):
        whole = data.clean(split)
        x = torch.cat([batch["views"][CLEAN][0] for batch in whole])
        y = torch.cat([batch["label"] for batch in whole])
        if split == "train":
            used = torch.tensor([held(SWEEP)(k) for b in whole for k in b.get("keys", [])])
            x, y = x[used], y[used]
        for feature, probe in zip(TWO, found.heads, strict=True):
            with torch.no_grad():
                ranked = probe.heads(feature_set(backbone, x, [feature])[0]).argsort(-1, True)
            for rate, order in zip(SWEEP.rates, ranked, strict=True):
                hits = [order[:, 0] == y, (order[:, :5] == y[:, None]).any(1)]
                scored[split, str(feature), rate] = [h.float().mean().item() for h in hits]
    for row in result["sweep"]:
        assert row["top1"] == pytest.approx(
            scored["train", row["feature"], row["rate"]][0], abs=1e-6
        )
    top = max(row["top1"] for row in result["sweep"])
    values = result["values"]
    key = (result["feature"], values["rate"])
    assert scored["train", *key][0] == pytest.approx(top, abs=1e-6)
    assert [values["top1"], values["top5"]] == pytest.approx(scored["val", *key], abs=1e-6)
    assert values["images"] == VAL
    assert values["rate"] == 30.0
    assert values["top1"] > 3 / CLASSES
    assert result["training"] == {"steps": 14, "batch": 10, "idle": 0}


def test_val_does_not_choose():
    found, chosen = learned(SWEEP, TWO), []
    for label in (None, 2, 5):
        coach().test(found, datamodule=Toys(val=label), verbose=False)
        chosen.append((found.result["feature"], found.result["values"]["rate"]))
    assert chosen[0] == chosen[1] == chosen[2]


@pytest.mark.parametrize("recipe", [NORMED, SWEEP])
def test_a_batch_in_parts_is_a_batch(recipe: LinearRecipe):
    whole, parts = learned(recipe, TWO), module(recipe, TWO, batch=5)
    coach(accumulate_grad_batches=2).fit(parts, datamodule=Toys(5))
    assert parts.steps == whole.steps
    assert parts.global_batch == whole.global_batch == 10
    for name, value in state(whole).items():
        torch.testing.assert_close(state(parts)[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("recipe", [NORMED, SWEEP])
def test_two_ranks_are_one_process(recipe: LinearRecipe):
    features = TWO if recipe is SWEEP else TWO[:1]
    whole, parts = learned(recipe, features), module(recipe, features, batch=5)
    two = {"devices": 2, "strategy": "ddp_fork"}
    coach(**two).fit(parts, datamodule=Toys(5, choose=parts.several))
    for name, value in state(whole).items():
        torch.testing.assert_close(state(parts)[name], value, rtol=1e-5, atol=1e-6, msg=name)
    found = [
        coach(**options).test(whole, datamodule=Toys(choose=whole.several), verbose=False)[0]
        for options in ({}, two)
    ]
    assert found[0] == pytest.approx(found[1])
    assert found[1]["linear/images"] == VAL


class Stopped(Exception):
    """In place of a signal."""


class Stop(pl.Callback):
    """Ends training amid it."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise Stopped


@pytest.mark.parametrize("recipe", [NORMED, SWEEP, ADAM])
def test_a_stopped_probe_goes_on_bitwise(recipe: LinearRecipe, tmp_path):
    features = TWO if recipe is SWEEP else TWO[:1]
    straight = learned(recipe, features)
    before, after = module(recipe, features), module(recipe, features)
    saving = {"enable_checkpointing": True}
    with pytest.raises(Stopped):
        coach(callbacks=[Checkpoints(tmp_path, every=3), Stop(8)], **saving).fit(
            before, datamodule=Toys(choose=before.several)
        )
    file = newest(tmp_path)
    assert file is not None
    kept = load(file)
    assert kept["global_step"] == 6
    assert not [name for name in kept["state_dict"] if name.startswith("backbone")]
    continued = coach(callbacks=[Checkpoints(tmp_path, every=3)], **saving)
    data = Toys(choose=after.several)
    continued.fit(after, datamodule=data, ckpt_path=str(file), weights_only=True)
    assert continued.global_step == 14
    for name, value in state(straight).items():
        assert torch.equal(state(after)[name], value), name
    results = []
    for one in (straight, after):
        coach().test(one, datamodule=Toys(choose=one.several), verbose=False)
        results.append(one.result)
    assert results[0] == results[1]
    other = module(replace(recipe, momentum=0.5), features)
    with pytest.raises(UserError, match="of another backbone, recipe, feature, precision"):
        coach().fit(other, datamodule=Toys(), ckpt_path=str(newest(tmp_path)), weights_only=True)


def test_settings_are_all_that_the_heads_hang_on():
    """But for how a batch is spread."""

    class Other(TinyBackbone):
        def __init__(self):
            super().__init__()
            self.config = {"heads": 2}

    def settings(batch: int = 10, backbone: Any = None, images: str = "", **options: Any) -> str:
        found = LinearAugmented(
            backbone or TinyBackbone(), recipe=ONE, features=TWO[:1], classes=CLASSES,
            samples=SAMPLES, batch_size=batch, images=images,
        )  # fmt: skip
        return found.settings(coach(**options))

    found = [
        settings(),
        settings(5),
        settings(images="bicubic"),
        settings(backbone=Other()),
        settings(precision="bf16-mixed"),
        settings(accumulate_grad_batches=2),
    ]
    assert len(set(found)) == len(found)
    assert found[0] == settings(5, accumulate_grad_batches=2)
    assert found[0] == settings(5, devices=2, strategy="ddp_fork")


def test_a_checkpoint_of_another_batch_is_refused(tmp_path):
    saving = {"enable_checkpointing": True}
    with pytest.raises(Stopped):
        coach(callbacks=[Checkpoints(tmp_path, every=3), Stop(4)], **saving).fit(
            module(), datamodule=Toys(choose=False)
        )
    with pytest.raises(UserError, match="batch over all ranks"):
        coach().fit(
            module(batch=5), datamodule=Toys(5, choose=False), ckpt_path=str(newest(tmp_path)),
            weights_only=True,
        )  # fmt: skip


def test_a_single_head_that_diverged_is_no_number():
    found = learned(replace(ONE, rates=(3e38,), weight_decay=1e9))
    with pytest.raises(UserError, match="all 1 heads diverged; check"):
        coach().test(found, datamodule=Toys(choose=False), verbose=False)


def test_a_finished_probe_does_not_train_again(tmp_path):
    before, after = module(), module()
    saving = {"enable_checkpointing": True}
    coach(callbacks=[Checkpoints(tmp_path)], **saving).fit(before, datamodule=Toys(choose=False))
    again = coach(callbacks=[Checkpoints(tmp_path), Stop(15)], **saving)
    file = str(newest(tmp_path))
    again.fit(after, datamodule=Toys(choose=False), ckpt_path=file, weights_only=True)
    assert torch.equal(before.heads[0].weight, after.heads[0].weight)


def test_the_backbone_stays_as_it_is():
    before = {k: v.clone() for k, v in TinyBackbone().state_dict().items()}
    found = learned(NORMED)
    assert not found.backbone.training
    assert not any(p.requires_grad for p in found.backbone.parameters())
    for name, value in found.backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_step_without_rows_is_counted():
    """Of two images a step, now and then both are held out."""
    recipe = replace(SWEEP, holdout=0.6)
    found = module(recipe, batch=2)
    coach().fit(found, datamodule=Toys(2))
    pairs = [[held(recipe)(f"image-{(2 * i + j) % SAMPLES}") for j in range(2)] for i in range(70)]
    assert found.idle == sum(map(all, pairs)) > 0
    assert found.heads[0].updates == 70 - found.idle
    coach().test(found, datamodule=Toys(2), verbose=False)
    assert found.result["training"]["idle"] == found.idle


def test_the_best_head_has_most_hits_then_least_loss_and_has_not_diverged():
    hits = torch.tensor([[3.0, 8, 8, 9, 9], [9, 9, 9, 9, 9]])
    loss = torch.tensor([1.0, 0.7, 0.6, torch.nan, torch.inf])
    table = Table(hits, loss, images=10)
    assert table.best() == 2
    assert table.accuracy(0) == (0.3, 0.9)
    with pytest.raises(UserError, match=r"all 2 heads diverged; check .* smaller recipe.rates"):
        Table(hits[:, 3:], loss[3:], images=10).best()


def test_a_stream_that_begins_elsewhere_is_refused():
    with pytest.raises(RuntimeError, match="the stream is at image 10, training at step 0 of 10"):
        coach().fit(module(), datamodule=Toys(choose=False, late=1))


def test_a_batch_larger_than_all_epochs_is_named():
    with pytest.raises(UserError, match="2 epochs of 70 images are no whole batch of 141"):
        coach().fit(module(batch=141), datamodule=Toys(141, choose=False))


def test_unlabelled_val_is_named():
    with pytest.raises(UserError, match="no labelled image to score"):
        coach().test(module(), datamodule=Toys(choose=False, val=-1), verbose=False)
