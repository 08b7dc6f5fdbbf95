"""Groups by first-match rules, rates written at every step, LARS against a loop in NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from contramask.models.heads import TokenHeads
from contramask.optim import LARS, Clip, Optim, Rule
from contramask.schedule import Schedule
from contramask.types import UserError
from tests.builders import tiny_vit


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


class Vit(nn.Module):
    """The names of a backbone of two blocks, a mask and an objective."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        vit = nn.ModuleDict(
            {
                "patch_embed": nn.Linear(3, 4),
                "blocks": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 5)]),
                "norm": nn.LayerNorm(5),
            }
        )
        vit.register_parameter("cls_token", nn.Parameter(torch.randn(1, 1, 4)))
        self.backbone = nn.ModuleDict({"vit": vit})
        self.masks = nn.ModuleDict({"m": nn.ParameterDict({"fill": torch.randn(4)})})
        head = nn.ModuleDict({"mlp": nn.Linear(5, 6), "last_layer": nn.Linear(6, 7)})
        self.objectives = nn.ModuleDict({"distil": nn.ModuleDict({"head": head})})


def gradients(module: nn.Module, scale: float = 3.0) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    for parameter in module.parameters():
        parameter.grad = scale * torch.randn_like(parameter)
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def test_layer_decay():
    """Of L = 2 blocks: what is before them has d^3, block i d^(2 - i), all else 1."""
    optim = Optim(lr=0.5, batch=None, layer_decay=0.1, rules=[Rule("patch_embed", lr=0.2), Rule()])
    optimizer = optim.build(Vit().named_parameters(), fused=False)
    optim.set(optimizer, 0.0, 1)
    rates = {n: g["lr"] / 0.5 for g in optimizer.param_groups for n in g["names"]}
    expected = {
        "backbone.vit.patch_embed.weight": 0.2e-3,
        "backbone.vit.cls_token": 1e-3,
        "masks.m.fill": 1e-3,
        "backbone.vit.blocks.0.bias": 1e-2,
        "backbone.vit.blocks.1.weight": 1e-1,
        "backbone.vit.norm.weight": 1.0,
        "objectives.distil.head.mlp.weight": 1.0,
    }
    for name, rate in expected.items():
        assert rates[name] == pytest.approx(rate), name


def test_rates_may_grow_with_the_root_of_the_batch():
    optim = Optim(lr=0.2, batch=1024, scaling="sqrt")
    optimizer = optim.build(network().named_parameters(), fused=False)
    assert optim.set(optimizer, 0.0, 4096) == pytest.approx(0.4)


@pytest.mark.parametrize("how", ["skip", "rate"])
def test_frozen_at_first(how):
    """`skip` leaves no trace in the optimiser, `rate` gathers moments."""
    model = Vit()
    optim = Optim(
        lr=0.1,
        batch=None,
        decay=0.5,
        rules=[Rule("last_layer", freeze=0.5, freeze_by=how)],
    )
    optimizer = optim.build(model.named_parameters(), fused=False)
    last = model.objectives["distil"]["head"]["last_layer"].weight
    other = model.objectives["distil"]["head"]["mlp"].weight
    seen = []
    for progress in (0.0, 0.25, 0.5):
        before = last.detach().clone(), other.detach().clone()
        gradients(model)
        optim.shorten(model.named_parameters(), progress)
        optim.set(optimizer, progress, 1)
        optimizer.step()
        seen.append((torch.equal(last, before[0]), torch.equal(other, before[1])))
    assert seen == [(True, False), (True, False), (False, False)]
    assert optimizer.state[last]["step"].item() == (1 if how == "skip" else 3)


@pytest.mark.parametrize("per", ["model", "module", "tensor"])
def test_clipping_is_a_loop(per):
    model = Vit()
    raw = gradients(model)
    parts = {
        "model": [list(raw)],
        "module": [
            [n for n in raw if n.startswith(("backbone", "masks"))],
            [n for n in raw if n.startswith("objectives.distil.head")],
        ],
        "tensor": [[n] for n in raw],
    }[per]
    assert sum(map(len, parts)) == len(raw)
    Optim(clip=Clip(6.0, per=per)).shorten(model.named_parameters(), 0.0)
    shortened = 0
    for names in parts:
        norm = np.sqrt(sum((raw[n].numpy().astype(float) ** 2).sum() for n in names))
        factor = min(1.0, 6.0 / (norm + 1e-6))
        shortened += factor < 1
        for name in names:
            found = dict(model.named_parameters())[name].grad
            np.testing.assert_allclose(found, factor * raw[name].numpy(), rtol=1e-5)
    assert shortened


@pytest.mark.parametrize(
    ("sharing", "parts"),
    [("shared", ["cls"]), ("split", ["cls", "last_layer2"]), ("separate", ["cls", "patch"])],
)
def test_each_head_is_clipped_by_itself(sharing, parts):
    heads = token_heads(sharing)
    model = nn.ModuleDict({"objectives": nn.ModuleDict({"distil": heads})})
    raw = gradients(model)
    Optim(clip=Clip(0.5, per="module")).shorten(model.named_parameters(), 0.0)
    for part in parts:
        names = [n for n in raw if n.startswith(f"objectives.distil.heads.{part}.")]
        norm = np.sqrt(sum((raw[n].numpy().astype(float) ** 2).sum() for n in names))
        for name in names:
            found = dict(model.named_parameters())[name].grad
            np.testing.assert_allclose(found, 0.5 / norm * raw.pop(name).numpy(), rtol=1e-5)
    assert not raw


def token_heads(sharing: str) -> nn.Module:
    heads = TokenHeads(5, 7, sharing=sharing, hidden=6, bottleneck=4, fixed_length=False)
    return nn.ModuleDict({"heads": heads})


def test_all_prototypes_are_frozen_by_one_rule():
    """Where patches have prototypes of their own, too: `last_layer` is in their name."""
    model = token_heads("split")
    gradients(model)
    Optim(rules=[Rule("last_layer", freeze=0.5)]).shorten(model.named_parameters(), 0.0)
    moved = {n for n, p in model.named_parameters() if p.grad is not None}
    assert moved == {n for n in moved if n.startswith("heads.cls.mlp.")}
    assert len(moved) == 6


def test_a_table_of_relative_positions_is_of_its_block():
    backbone = tiny_vit(positions="relative_per_block", timm={"depth": 3})
    model = nn.ModuleDict({"backbone": backbone})
    optim = Optim(lr=0.5, batch=None, layer_decay=0.1)
    optimizer = optim.build(model.named_parameters(), fused=False)
    optim.set(optimizer, 0.0, 1)
    rates = {n: g["lr"] / 0.5 for g in optimizer.param_groups for n in g["names"]}
    tables = [n for n in rates if n.startswith("backbone.bias.")]
    assert len(tables) == 3
    for name in tables:
        block = int(name.split(".")[2])
        assert rates[name] == pytest.approx(0.1 ** (3 - block)), name
        assert rates[name] == rates[f"backbone.vit.blocks.{block}.mlp.fc1.weight"]
    shared = nn.ModuleDict({"backbone": tiny_vit(positions="relative", timm={"depth": 3})})
    groups = optim.groups(shared.named_parameters())
    assert [g["lr_factor"] for g in groups for n in g["names"] if "backbone.bias" in n] == [1.0]


@pytest.mark.parametrize("norm", [0.0, -3.0])
def test_bad_clips(norm):
    with pytest.raises(UserError, match=r"clip is .*above 0.*set model.optim.clip"):
        Clip(norm)
