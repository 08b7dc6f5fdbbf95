"""When things move: teachers once per update, randomness by place, resume to the last bit."""

import copy

import pytest
import pytorch_lightning as pl
import torch

from contramask.models.ema import EmaCopy
from contramask.optim import Optim
from contramask.schedule import Schedule, at
from contramask.types import Step
from tests.builders import (
    RECIPES,
    Losses,
    StopAt,
    ToyStream,
    fit,
    known,
    pretraining,
    toy_batch,
)


@pytest.mark.parametrize("ema", ["before", "after"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_teachers_move_once_per_update(monkeypatch, ema, accumulate):
    moves = []
    monkeypatch.setattr(EmaCopy, "update", lambda self, momentum: moves.append((self, momentum)))
    module = pretraining("moco", ema=ema, momentum=Schedule(peak=0.5, end=1.0, shape="linear"))
    fit(module, steps=4, accumulate_grad_batches=accumulate)
    expected = [0.5, 0.625, 0.75, 0.875]
    for teacher in (module.teacher, module.objectives["contrast"].teacher):
        assert [m for who, m in moves if who is teacher] == pytest.approx(expected)


@pytest.mark.parametrize("ema", ["before", "after"])
def test_order_of_a_step_against_a_loop(ema):
    """MoCo v3 moves its teacher before the keys of a step, others after the weights."""
    module = known(pretraining("moco", ema=ema, optim=Optim(lr=1e-2, batch=None)))
    twin = copy.deepcopy(module)
    losses = Losses()
    fit(module, steps=4, stream=ToyStream(dtype=torch.float64), callbacks=[losses])

    def move(momentum):
        pairs = [(twin.backbone, twin.teacher), (term.projector, term.teacher)]
        for student, teacher in pairs:
            for s, t in zip(student.parameters(), teacher.module.parameters(), strict=True):
                t.data = momentum * t.data + (1 - momentum) * s.data

    term, found = twin.terms["contrast"], []
    optimizer = twin.optim.build(twin.named_parameters(), fused=False)
    for i in range(4):
        momentum, step = at(twin.momentum, i / 4), Step(i, i / 4)
        twin.optim.set(optimizer, i / 4, 4)
        if ema == "before":
            move(momentum)
        batch = toy_batch(4 * i, 4, torch.float64)
        loss = term(twin.encode(batch, step), batch, step).value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if ema == "after":
            move(momentum)
        found.append(loss.item())
    assert losses.total == pytest.approx(found, rel=1e-6)
    for name, value in module.teacher.state_dict().items():
        torch.testing.assert_close(twin.teacher.state_dict()[name], value, rtol=1e-6, atol=1e-6)


def test_rates_are_of_the_update_that_uses_them():
    seen = []

    class Rates(pl.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
            seen.append(optimizer.param_groups[0]["lr"])

    optim = Optim(lr=Schedule(peak=1.0, end=0.0, warmup=0.5, shape="linear"), batch=None)
    module = pretraining("simmim", optim=optim)
    before = {n: p.detach().clone() for n, p in module.backbone.named_parameters()}
    fit(module, steps=1, callbacks=[Rates()])
    # Warm-up starts at exactly 0: the first update moves nothing.
    assert seen == [0.0]
    assert all(torch.equal(p, before[n]) for n, p in module.backbone.named_parameters())
    seen.clear()
    fit(pretraining("simmim", optim=optim), steps=4, callbacks=[Rates()])
    assert seen == [0.0, 0.5, 1.0, 0.5]


def test_layers_are_random_by_place_not_by_history():
    totals = []
    for seed in (1, 2):
        losses, module = Losses(), pretraining("hybrid", drop_path=0.3)
        torch.manual_seed(seed)
        fit(module, steps=2, callbacks=[losses])
        totals.append(losses.total)
    assert totals[0] == totals[1]
    losses = Losses()
    fit(pretraining("hybrid", drop_path=0.3, seed=1), steps=2, callbacks=[losses])
    assert losses.total[0] != totals[0][0]


def test_accumulation_is_one_larger_batch():
    """Masks belong to images: three micro-batches of two are the batch of six they make up."""
    whole, parts = (pretraining("simmim") for _ in range(2))
    fit(whole, steps=3, stream=ToyStream(6))
    fit(parts, steps=3, stream=ToyStream(2), accumulate_grad_batches=3)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-4, atol=2e-6)


def everything(trainer: pl.Trainer) -> dict[str, torch.Tensor]:
    """Weights, teachers, statistics and moments."""
    module, optimizer = trainer.lightning_module, trainer.optimizers[0]
    found = {k: v.clone() for k, v in module.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        found |= {f"{i}/{k}": v.clone() for k, v in state.items()}
    return found


@pytest.mark.parametrize("recipe", sorted(RECIPES))
@pytest.mark.parametrize("stop", [1, 3])
def test_stopped_and_resumed_is_straight(tmp_path, recipe, stop):
    """To the last bit, in another process's random state, in the middle of an endless epoch."""
    options = {"steps": 5, "accumulate_grad_batches": 3}
    made = {"drop_path": 0.1, "ema": "before" if recipe == "moco" else "after"}
    straight = Losses()
    expected = everything(fit(pretraining(recipe, **made), callbacks=[straight], **options))
    first, second = Losses(), Losses()
    trainer = fit(pretraining(recipe, **made), callbacks=[first, StopAt(stop)], **options)
    assert trainer.global_step == stop
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    module = pretraining(recipe, **made)
    torch.manual_seed(99)
    resumed = fit(module, callbacks=[second], ckpt=tmp_path / "last.ckpt", **options)
    assert first.total + second.total == straight.total
    assert len(straight.total) == 15
    found = everything(resumed)
    assert found.keys() == expected.keys()
    assert [k for k, v in expected.items() if not torch.equal(found[k], v)] == []


def test_a_resumed_run_obeys_a_changed_configuration(tmp_path):
    trainer = fit(pretraining("simmim", optim=Optim(lr=0.3, batch=None)), callbacks=[StopAt(1)])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    module = pretraining("simmim", optim=Optim(lr=0.1, batch=None))
    trainer = fit(module, ckpt=tmp_path / "last.ckpt")
    assert {g["lr"] for g in trainer.optimizers[0].param_groups} == {0.1}
