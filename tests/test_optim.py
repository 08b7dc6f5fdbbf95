"""Groups by first-match rules, rates written at every step, LARS against a loop in NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from contramask.optim import LARS, Optim, Rule
from contramask.schedule import Schedule
from contramask.types import UserError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5)),
            "head": nn.Linear(5, 2),
            "teacher": nn.Linear(5, 2).requires_grad_(False),
        }
    )


def factors(optim: Optim) -> dict[str, tuple[float, float]]:
    groups = optim.groups(network().named_parameters())
    return {n: (g["lr_factor"], g["decay_factor"]) for g in groups for n in g["names"]}


def test_a_rule_by_dimensions_exempts_biases_and_norms():
    assert factors(Optim(rules=[Rule(ndim=1, decay=0.0)])) == {
        "encoder.0.weight": (1, 1),
        "encoder.0.bias": (1, 0),
        "encoder.1.weight": (1, 0),
        "encoder.1.bias": (1, 0),
        "head.weight": (1, 1),
        "head.bias": (1, 0),
    }


def test_first_matching_rule_decides():
    rules = [Rule(r"\.bias$", lr=2.0), Rule("^head", lr=3.0, decay=0.5), Rule(ndim=1, decay=0.0)]
    assert factors(Optim(rules=rules)) == {
        "encoder.0.weight": (1, 1),  # no rule: factors 1
        "encoder.0.bias": (2, 1),
        "encoder.1.weight": (1, 0),
        "encoder.1.bias": (2, 1),
        "head.weight": (3, 0.5),
        "head.bias": (2, 1),
    }


def test_groups_are_of_equal_factors():
    groups = Optim(rules=[Rule("head"), Rule(ndim=1, decay=0.0)]).groups(
        network().named_parameters()
    )
    assert [len(g["params"]) for g in groups] == [3, 3]
    for group in groups:
        assert len(group["names"]) == len(group["params"])


@pytest.mark.parametrize(
    ("rules", "which"), [([Rule("haed")], "0 .'haed'"), ([Rule("head"), Rule("head.bias")], "1 ")]
)
def test_a_rule_that_matches_nothing_is_a_mistake(rules, which):
    with pytest.raises(UserError, match=rf"rule {which}.*matches no parameter.*model.optim.rules"):
        Optim(rules=rules).groups(network().named_parameters())


def test_rates():
    rules = [Rule("head", lr=0.1), Rule(ndim=1, decay=0.0)]
    optim = Optim(lr=Schedule(peak=0.2, shape="linear"), batch=256, decay=0.5, rules=rules)
    optimizer = optim.build(network().named_parameters(), fused=False)
    assert optim.set(optimizer, 0.25, 1024) == pytest.approx(0.6)  # 0.15 at a fourfold batch
    rates = {(g["lr_factor"], g["decay_factor"]): g for g in optimizer.param_groups}
    assert rates[0.1, 1]["lr"] == pytest.approx(0.06)
    assert rates[1, 0]["lr"] == pytest.approx(0.6)
    assert {k: g["weight_decay"] for k, g in rates.items()} == {
        (1, 1): 0.5,
        (0.1, 1): 0.5,
        (1, 0): 0,
    }
    assert Optim(lr=0.3, batch=None, rules=[]).set(optimizer, 0.0, 4096) == 0.3


def test_decay_may_move():
    optim = Optim(decay=Schedule(peak=0.04, end=0.4), rules=[])
    optimizer = optim.build(network().named_parameters(), fused=False)
    optim.set(optimizer, 1.0, 256)
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.4)


def test_a_resumed_optimiser_obeys_the_configuration():
    head, vectors = "^head.weight", Rule(ndim=1, decay=0.0)
    old = Optim(lr=0.5, batch=None, rules=[Rule(head, lr=0.1), vectors])
    new = Optim(lr=0.1, batch=None, rules=[Rule(head, lr=0.5), vectors], betas=(0.8, 0.9))
    saved = old.build(network().named_parameters(), fused=False)
    old.set(saved, 0.0, 8)
    resumed = new.build(network().named_parameters(), fused=False)
    resumed.load_state_dict(saved.state_dict())
    assert resumed.param_groups[0]["lr"] == 0.5  # what torch does
    assert resumed.param_groups[0]["betas"] == (0.9, 0.95)
    new.set(resumed, 0.0, 8)
    assert sorted(g["lr"] for g in resumed.param_groups) == pytest.approx([0.05, 0.1, 0.1])
    assert {g["betas"] for g in resumed.param_groups} == {(0.8, 0.9)}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adamw", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
        ("lars", LARS),
        ("lars_classic", LARS),
    ],
)
def test_build(name, kind):
    optimizer = Optim(name=name, betas=(0.8, 0.95)).build(
        network().named_parameters(), fused=name == "adamw"
    )
    assert type(optimizer) is kind
    found = optimizer.defaults
    assert found["betas"] == (0.8, 0.95) if name == "adamw" else found["momentum"] == 0.8
    if kind is LARS:
        assert found["classic"] == (name == "lars_classic")


@pytest.mark.parametrize("classic", [False, True])
def test_lars_against_a_loop(classic):
    """Rates move between the steps, where the two spellings part."""
    rng, eta, momentum, decay = np.random.default_rng(0), 0.01, 0.9, 0.1
    shapes = {"matrix": (3, 4), "vector": (5,), "zero": (2, 2)}
    w = {k: rng.normal(size=s) * (k != "zero") for k, s in shapes.items()}
    v = {k: np.zeros(s) for k, s in shapes.items()}
    ours = {k: nn.Parameter(torch.tensor(x)) for k, x in w.items()}
    optimizer = LARS(ours.values(), momentum=momentum, eta=eta, classic=classic)
    optimizer.param_groups[0]["weight_decay"] = decay
    for lr in (0.5, 0.1, 2.0, 0.0, 1.0):
        optimizer.param_groups[0]["lr"] = lr
        for k, x in w.items():
            g = rng.normal(size=x.shape)
            ours[k].grad = torch.tensor(g)
            if x.ndim > 1:
                g = g + decay * x
                if np.linalg.norm(x) > 0:
                    g = g * eta * np.linalg.norm(x) / np.linalg.norm(g)
            if classic:
                v[k] = momentum * v[k] + lr * g
                w[k] = x - v[k]
            else:
                v[k] = momentum * v[k] + g
                w[k] = x - lr * v[k]
        optimizer.step()
        for k, x in w.items():
            np.testing.assert_allclose(ours[k].detach().numpy(), x, rtol=1e-12, atol=1e-15)


def test_lars_skips_what_has_no_gradient_and_keeps_zero_gradients_finite():
    a, b = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    b.grad = torch.zeros(2, 3)
    optimizer = LARS([a, b], lr=1.0)
    assert optimizer.step(lambda: 0.5) == 0.5
    assert torch.equal(a, torch.ones(2, 3))
    assert torch.equal(b, torch.ones(2, 3))  # no gradient and no decay: 0 / 0 must not appear
