"""Fine-tuning: the loss, the rates, the average, scores, going on."""

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from contramask.analysis.suite import Settings
from contramask.callbacks.analysis import AnalysisCallback
from contramask.callbacks.checkpoint import Checkpoints
from contramask.callbacks.validation import Validation
from contramask.data.augmentation import Augment
from contramask.models.ema import EmaCopy
from contramask.optim import Optim
from contramask.schedule import Schedule
from contramask.types import UserError
from tests.builders import Losses, tiny_vit
from tests.training.tuned import CLASSES, OPTIM, SIDE, Memory, labels, model, pictures, tune


class Watch(pl.Callback):
    """Rates, gradients and weights of every update."""

    def __init__(self):
        self.rates, self.missing, self.weights = [], set(), []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        groups = optimizer.param_groups
        self.rates.append({n: (g["lr"], g["weight_decay"]) for g in groups for n in g["names"]})
        named = pl_module.classifier.named_parameters()
        self.missing |= {n for n, p in named if p.requires_grad and p.grad is None}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        state = pl_module.classifier.state_dict()
        self.weights.append({k: v.clone() for k, v in state.items()})


# ---- one update -------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_the_loss_is_the_cross_entropy_with_the_targets(pool):
    module, losses = model(pool=pool), Losses()
    with torch.no_grad():
        logits = module.classifier.eval()(pictures(0, 4))
    module.train()
    wanted = torch.full((4, CLASSES), 0.1 / CLASSES)
    wanted[torch.arange(4), labels(0, 4)] += 0.9
    expected = -(wanted * logits.log_softmax(1)).sum(1).mean()
    tune(module, steps=1, callbacks=[losses])
    assert losses.total[0] == pytest.approx(expected.item(), rel=1e-6)
    assert losses.terms[0] == {"classify": losses.total[0]}


def test_mixed_images_and_targets_are_what_is_learned():
    losses = Losses()
    data = Memory(4, Augment(randaugment=None, erasing=0.0))
    module = model()
    images, target = data.finish(pictures(0, 4), labels(0, 4), 0)
    assert ((target > 0.1).sum(1) > 1).any()
    with torch.no_grad():
        expected = F.cross_entropy(module.classifier(images), target)
    tune(module, steps=1, data=data, callbacks=[losses])
    assert losses.total[0] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_rates_by_layer_at_every_step(pool):
    """Half a layer: 2 blocks, so 1/8 before them, 1/4, 1/2, and 1 behind. A warm-up of one step."""
    watch = Watch()
    tune(model(pool=pool), callbacks=[watch])
    assert watch.missing == set()
    for update, rate in enumerate([0.0, 1e-3, 0.7525e-3, 0.2575e-3]):
        for name, (found, decay) in watch.rates[update].items():
            factor = {"blocks.0": 1 / 4, "blocks.1": 1 / 2, "embed": 1 / 8, "cls_token": 1 / 8}
            layer = next((f for part, f in factor.items() if part in name), 1.0)
            assert found == pytest.approx(layer * rate, abs=1e-12), name
            plain = "embed.proj.weight" in name or name == "head.weight"
            plain = plain or (name.endswith("weight") and "norm" not in name)
            assert decay == (0.05 if plain else 0.0), name
    assert {"head.weight", "head.bias", "backbone.vit.norm.weight"} <= watch.rates[0].keys()
    assert "backbone.vit.pos_embed" in watch.rates[0]


def test_a_frozen_patch_projection_stays_where_it_is():
    watch = Watch()
    tune(model(freeze_patch_embed=True), callbacks=[watch])
    first, last = watch.weights[0], watch.weights[-1]
    name = "backbone.vit.patch_embed.proj.weight"
    assert torch.equal(first[name], last[name])
    assert not torch.equal(first["backbone.vit.pos_embed"], last["backbone.vit.pos_embed"])
    assert name not in watch.rates[0]


def test_the_average_follows_the_weights():
    watch = Watch()
    momentum = Schedule(peak=0.5, end=0.9, shape="linear")
    module = model(ema=momentum)
    expected = {k: v.clone() for k, v in module.classifier.state_dict().items()}
    tune(module, callbacks=[watch])
    for update, weights in enumerate(watch.weights):
        m = 0.5 + 0.4 * update / 4
        expected = {k: m * v + (1 - m) * weights[k] for k, v in expected.items()}
    found = module.average.module.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)
    assert isinstance(module.average, EmaCopy)


def test_it_learns():
    """Every image has the colour of its label."""
    optim = Optim(lr=3e-3, batch=None, betas=(0.9, 0.999), rules=OPTIM.rules)
    module, losses = model(optim=optim), Losses()
    tune(module, steps=40, data=Memory(14), callbacks=[losses])
    assert losses.total[0] > 1.8
    assert losses.total[-1] < 1.2


# ---- scores -----------------------------------------------------------------------------------


def test_scores_are_counted_by_hand():
    module, validation = model(ema=0.5), Validation(2)
    tune(module, callbacks=[validation])
    images, wanted = pictures(1000, 25), labels(1000, 25)
    for prefix, net in (("", module.classifier), ("ema_", module.average)):
        with torch.no_grad():
            scores = net.eval()(images)
        order = scores.argsort(1, descending=True)
        top1 = (order[:, 0] == wanted).float().mean().item()
        top5 = (order[:, :5] == wanted[:, None]).any(1).float().mean().item()
        loss = -scores.log_softmax(1)[torch.arange(25), wanted].mean().item()
        assert validation.values[f"{prefix}top1"] == pytest.approx(top1, abs=1e-6)
        assert validation.values[f"{prefix}top5"] == pytest.approx(top5, abs=1e-6)
        assert validation.values[f"{prefix}loss"] == pytest.approx(loss, abs=2e-6)
    assert (validation.values["images"], validation.step) == (25, 4)


def test_scoring_and_drift_leave_training_as_it_is(tmp_path):
    """And the drift starts from what was pretrained."""
    plain, watched = model(drop_path=0.4), model(drop_path=0.4)
    options = {"replicates": 0, "cka": ("flat/raw",), "sublayers": ("block",), "minibatch": 5}
    drift = AnalysisCallback(
        tmp_path, every=2, images=25, analyses=["cka"], settings=Settings(**options), figures=False
    )
    found = []

    class Note(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            names = [f"cka/initial/block_{i:02d}" for i in range(2)]
            found.append([trainer.callback_metrics.get(n, torch.tensor(2.0)).item() for n in names])

    data = {"data": Memory(6, Augment(randaugment=None, erasing=0.5))}
    tune(plain, **data)
    tune(
        watched,
        data=Memory(6, data["data"].finish.augment),
        callbacks=[Validation(1), drift, Note()],
    )
    for (name, a), b in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert {p.name for p in tmp_path.glob("*.json")} == {f"step-{i:08d}.json" for i in (0, 2, 4)}
    assert found[0] == [2.0, 2.0]  # nothing to compare with yet
    assert all(0 < x < 1 for x in found[-1])


# ---- going on ---------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_stopped_and_continued_is_straight(tmp_path, accumulate):
    """Weights, moments, average and scores, with drop path, erasing and mixing."""

    def start(ckpt=None):
        module, validation = model(drop_path=0.5, ema=0.8), Validation(2)
        saver = Checkpoints(tmp_path / ("again" if ckpt else "straight"), every=3)
        trainer = tune(
            module,
            steps=6,
            data=Memory(4, Augment(randaugment=None, erasing=0.5)),
            ckpt=ckpt,
            callbacks=[validation, saver],
            enable_checkpointing=True,
            accumulate_grad_batches=accumulate,
        )
        moments = trainer.optimizers[0].state_dict()["state"]
        flat = {f"{i}.{k}": v for i, m in moments.items() for k, v in m.items()}
        return module.state_dict() | flat, validation.values

    straight, values = start()
    checkpoint = tmp_path / "straight" / "step-00000003.ckpt"
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["global_step"] == 3
    resumed, again = start(str(checkpoint))
    assert straight.keys() == resumed.keys()
    assert [k for k, v in straight.items() if not torch.equal(v, resumed[k])] == []
    assert values == again


# ---- mistakes ---------------------------------------------------------------------------------


def test_mistakes():
    with pytest.raises(UserError, match=r"ema is 1.0; it is a momentum in \[0, 1\)"):
        model(ema=1.0)
    with pytest.raises(UserError, match=r"images have 16 pixels a side, .* ready for 20"):
        tune(model(size=20))
    with pytest.raises(UserError, match=r"validation every -1 updates"):
        Validation(-1)
    with pytest.raises(UserError, match=r"trainer.max_steps is -1"):
        tune(model(), steps=-1, max_epochs=1)


def test_description():
    text = model(freeze_patch_embed=True).describe()
    assert "M trained parameters" in text
    assert "7 classes from the mean of patches" in text
    assert tiny_vit(img_size=SIDE).spec.grid == (4, 4)
