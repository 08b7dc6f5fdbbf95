"""Gradients of the terms: known forces, and the parts of what training computes."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from contramask.callbacks.balance import Balance
from contramask.objectives.objective import Objective
from contramask.schedule import Schedule
from contramask.tracking.jsonl import JSONLLogger, read_metrics
from contramask.training.balance import balance
from contramask.types import Loss, Pass, Step, Tokens, UserError
from tests.builders import ToyStream, fit, pretraining, toy_batch

READS = Pass("global")


class Pull(Objective):
    """A term that is linear in the class token: its gradient is known."""

    def __init__(self, direction: list[float]):
        super().__init__()
        self.passes = (READS,)
        self.direction = torch.tensor(direction)

    def forward(self, feats, batch, step) -> Loss:
        return Loss((feats[READS].cls @ self.direction).mean(), {})


def weigh(**directions: list[float]) -> dict[str, float]:
    shared = nn.Parameter(torch.ones(3))
    fixed = nn.Parameter(torch.ones(3), requires_grad=False)

    def encode(batch, step):
        return {READS: Tokens((shared * fixed).expand(4, 1, 3), torch.zeros(4, 2, 3))}

    terms = {name: Pull(direction) for name, direction in directions.items()}
    weights = dict.fromkeys(terms, 0.5)
    found = balance(encode, terms, weights, [shared, fixed], toy_batch(0, 4), Step(0, 0.0))
    assert shared.grad is None
    return {k: v.item() for k, v in found.items()}


def test_two_forces():
    found = weigh(pull=[3.0, 4.0, 0.0], push=[-4.0, 0.0, 3.0])
    assert found == pytest.approx(
        {
            "pull/grad_norm": 5.0,
            "push/grad_norm": 5.0,
            "pull/weighted_grad_norm": 2.5,
            "push/weighted_grad_norm": 2.5,
            "cosine/pull/push": -12 / 25,
        }
    )


def test_a_term_without_gradient_has_no_direction():
    found = weigh(pull=[3.0, 4.0, 0.0], rest=[0.0, 0.0, 0.0])
    assert found["rest/grad_norm"] == 0
    assert found["cosine/pull/rest"] == 0


class Gradients(pl.Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        grads = [p.grad for p in pl_module.backbone.parameters() if p.requires_grad]
        self.found = torch.cat([g.flatten() for g in grads])


def test_the_terms_are_the_parts_of_the_gradient():
    """|a g + b h|^2 of training = a^2 |g|^2 + b^2 |h|^2 + 2 a b |g| |h| cos."""
    gradients = Gradients()
    weights = {"contrast": 0.3, "masked": Schedule(peak=0.7, end=0.7)}
    module = pretraining("hybrid", drop_path=0.2, weights=weights)
    fit(module, steps=1, callbacks=[gradients], stream=ToyStream())
    again = pretraining("hybrid", drop_path=0.2, weights=weights)
    trainer = pl.Trainer(max_steps=1, logger=False, accelerator="cpu", enable_checkpointing=False)
    again._trainer = trainer
    again.train()
    shown = {k: v.item() for k, v in again.balance(toy_batch(0, 4)).items()}
    a, b = shown["contrast/weighted_grad_norm"], shown["masked/weighted_grad_norm"]
    total = (a**2 + b**2 + 2 * a * b * shown["cosine/contrast/masked"]) ** 0.5
    assert total == pytest.approx(gradients.found.norm().item(), rel=1e-4)


@pytest.mark.parametrize("every", [2, 3])
def test_when(tmp_path, every):
    logger = JSONLLogger(tmp_path)
    fit(pretraining("hybrid"), steps=4, callbacks=[Balance(every=every)], logger=logger)
    rows = [r for r in read_metrics(tmp_path) if "balance/cosine/contrast/masked" in r]
    assert [r["step"] for r in rows] == ([2, 4] if every == 2 else [3, 4])
    assert all(abs(r["balance/cosine/contrast/masked"]) <= 1 + 1e-6 for r in rows)


def test_one_term_is_not_reported(tmp_path):
    logger = JSONLLogger(tmp_path)
    watching = [Balance(every=1)]
    fit(pretraining("mae"), steps=2, callbacks=watching, logger=logger, log_every_n_steps=1)
    assert len(read_metrics(tmp_path)) == 2
    assert not any(k.startswith("balance/") for r in read_metrics(tmp_path) for k in r)


def test_every():
    with pytest.raises(UserError, match=r"balance: every is -1.*balance.every"):
        Balance(every=-1)
