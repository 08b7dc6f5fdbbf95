"""The linear probe: many learning rates at once, chosen on held-out rows of train."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from contramask.optim import LARS
from contramask.probes.linear import LinearProbe, LinearRecipe
from contramask.probes.linear_recipe import Mover
from contramask.types import UserError

N, F, C = 90, 5, 3
PLAIN = LinearRecipe(rates=(0.5,), epochs=1, batch=30, batch_norm=False)


def rows(number: int = N, seed: int = 0, noise: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping classes, so that the best weights are finite."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(C, (number,), generator=generator)
    scale = torch.tensor([1.0, 3.0, 0.2, 1.0, 2.0])
    return (noise * torch.randn(number, F, generator=generator) + torch.eye(F)[y]) * scale, y


@pytest.mark.parametrize(
    ("optimiser", "decay", "batch_norm"),
    [
        ("sgd", 0.0, False),
        ("sgd", 0.0, True),
        ("sgd", 0.3, True),
        ("lars", 0.0, False),
        ("lars", 0.0, True),
        ("lars", 0.3, False),
        ("adamw", 0.0, False),
        ("adamw", 0.3, True),
    ],
)
def test_each_head_is_a_linear_layer_trained_alone_by_autograd(
    optimiser: str, decay: float, batch_norm: bool
):
    x, y = rows()
    steps, batch = 6, 15
    rates = (0.1, 2.0, 7.0)
    recipe = replace(
        PLAIN,
        rates=rates,
        batch_norm=batch_norm,
        optimiser=optimiser,
        warmup=0.34,
        momentum=0.8,
        weight_decay=decay,
    )
    probe = LinearProbe(F, C, recipe=recipe, steps=steps)
    first = probe.weight[0].clone()
    for part in torch.arange(N).split(batch):
        probe.learn(x[part], y[part])
    for g, rate in enumerate(rates):
        norm = nn.BatchNorm1d(F, affine=False, eps=1e-6, momentum=None)
        head = nn.Linear(F, C)
        with torch.no_grad():
            head.weight.copy_(first.mT)
            head.bias.zero_()
        if optimiser == "adamw":
            steps_of = torch.optim.AdamW(
                head.parameters(), lr=0.0, betas=(0.8, 0.999), weight_decay=decay
            )
        else:
            build = {"sgd": torch.optim.SGD, "lars": LARS}[optimiser]
            steps_of = build(head.parameters(), lr=0.0, momentum=0.8, weight_decay=decay)
        for i, part in enumerate(torch.arange(N).split(batch)):
            progress = i / steps
            cosine = 0.5 * (1 + math.cos(math.pi * (progress - 0.34) / 0.66))
            factor = progress / 0.34 if progress < 0.34 else cosine
            steps_of.param_groups[0]["lr"] = rate * batch / 256 * factor
            z = norm(x[part]) if batch_norm else x[part]
            steps_of.zero_grad()
            nn.functional.cross_entropy(head(z), y[part]).backward()
            steps_of.step()
        norm.eval()
        with torch.no_grad():
            expected = head(norm(x) if batch_norm else x)
        torch.testing.assert_close(probe.heads(x)[g], expected, rtol=1e-4, atol=1e-5)


def test_two_rows_by_hand():
    """Heads of zeros believe in both classes alike; the rate is 128 x 2 rows / 256 = 1."""
    recipe = replace(PLAIN, rates=(128.0, 256.0), init_std=0.0)
    probe = LinearProbe(2, 2, recipe=recipe, steps=4)
    x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
    probe.learn(x, y)
    moved = torch.tensor([[0.25, -0.25], [-0.5, 0.5]])  # -x^T (1/2 - onehot) / 2
    assert torch.equal(probe.weight, torch.stack([moved, 2 * moved]))
    assert not probe.bias.any()
    probe = LinearProbe(2, 2, recipe=recipe, steps=4)
    probe.learn(x, y, batch=6)
    assert torch.equal(probe.weight[0], 3 * moved)


def test_lars_takes_the_steps_of_the_official_code(parity):
    case = parity("mae")["lars"]
    recipe = LinearRecipe(
        rates=(1.0,), optimiser="lars", momentum=case["momentum"], weight_decay=case["wd"]
    )
    mover, nothing = Mover(recipe), torch.empty(0)
    assert mover.eta == case["eta"]
    values = [case[k].clone()[None] for k in ("w0", "b0")]
    speeds = [torch.zeros_like(v) for v in values]
    rate = torch.tensor([case["lr"]])
    for update, (gradients, after) in enumerate(zip(case["grads"], case["traj"], strict=True)):
        for value, gradient, speed, expected in zip(values, gradients, speeds, after, strict=True):
            mover.move(value, gradient[None], speed, nothing, rate, update=update)
            torch.testing.assert_close(value[0], expected, rtol=0, atol=1e-6)


def test_once_an_epoch_or_at_every_step():
    """Ten steps in five epochs: two of each rate, and the cosine as if every step had its own."""
    steps = [i / 10 for i in range(10)]
    often, seldom = (LinearRecipe(epochs=5, per_epoch=once).schedule(512) for once in (False, True))
    found = [seldom(progress) for progress in steps]
    epochs = [1 + math.cos(math.pi * e / 5) for e in range(5)]
    assert found == pytest.approx([rate for rate in epochs for _ in range(2)])
    assert [often(p) for p in steps] == pytest.approx([1 + math.cos(math.pi * p) for p in steps])


def test_a_step_without_rows_moves_the_schedule_alone():
    x, y = rows(30)
    recipe = replace(PLAIN, batch_norm=True, epochs=2, per_epoch=True)
    found = []
    for pause in (False, True):
        probe = LinearProbe(F, C, recipe=recipe, steps=4)
        if pause:
            before = probe.weight.clone()
            probe.skip()
            assert torch.equal(probe.weight, before)
        probe.learn(x, y)
        found.append(probe)
    assert torch.equal(found[0].weight, found[1].weight)  # the same stair
    assert torch.equal(found[0].mean, found[1].mean)
    assert [probe.step for probe in found] == [1, 2]


def test_a_resumable_probe_goes_on_bitwise():
    x, y = rows()
    recipe = replace(PLAIN, rates=(0.1, 2.0), batch_norm=True, optimiser="adamw")
    straight, first, second = (
        LinearProbe(F, C, recipe=recipe, steps=4, resumable=True) for _ in range(3)
    )
    parts = torch.arange(80).split(20)
    for part in parts:
        straight.learn(x[part], y[part])
    for part in parts[:2]:
        first.learn(x[part], y[part])
    second.load_state_dict(first.state_dict())
    second.step, second.updates = first.step, first.updates
    for part in parts[2:]:
        second.learn(x[part], y[part])
    for name, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_the_tally_counts_by_hand():
    probe = LinearProbe(1, 7, recipe=replace(PLAIN, rates=(0.1, 0.2), init_std=0.0))
    probe.bias.copy_(torch.tensor([[7.0, 6, 5, 4, 3, 2, 1], [1.0, 2, 3, 4, 5, 6, 7]]))
    tops, loss = probe.tally(torch.zeros(4, 1), torch.tensor([0, 0, 4, 6]), tops=(1, 5))
    assert tops.tolist() == [[2, 1], [3, 2]]
    scores = probe.bias.log_softmax(1)
    assert loss.tolist() == pytest.approx(
        [-(2 * s[0] + s[4] + s[6]).item() for s in scores], rel=1e-6
    )


def test_at_convergence_it_is_logistic_regression():
    x, y = rows()
    recipe = LinearRecipe(rates=(6.0,), epochs=500, batch=N, batch_norm=False)
    probe = LinearProbe(F, C, recipe=recipe)
    probe.fit(x, y)
    theirs = LogisticRegression(C=np.inf, tol=1e-8, max_iter=10000).fit(x.numpy(), y.numpy())
    v, _ = rows(40, seed=1)
    expected = torch.from_numpy(theirs.predict_proba(v.numpy()))
    torch.testing.assert_close(probe.predict(v).softmax(1), expected.float(), rtol=0, atol=2e-3)


def test_at_convergence_batch_norm_does_not_move_the_optimum():
    x, y = rows()
    recipe = LinearRecipe(rates=(6.0,), epochs=500, batch=N, batch_norm=False)
    plain, normed = (LinearProbe(F, C, recipe=replace(recipe, batch_norm=b)) for b in (False, True))
    plain.fit(x, y)
    normed.fit(x, y)
    # The eval statistics have the unbiased variance, hence the tolerance.
    torch.testing.assert_close(
        plain.predict(x).softmax(1), normed.predict(x).softmax(1), rtol=0, atol=1e-2
    )


def test_heads_of_a_grid_do_not_touch_each_other():
    x, y = rows()
    together = LinearProbe(F, C, recipe=replace(PLAIN, rates=(0.1, 1e6, 2.0)), steps=3)
    alone = LinearProbe(F, C, recipe=replace(PLAIN, rates=(2.0,)), steps=3)
    for part in torch.arange(N).split(30):
        together.learn(x[part], y[part])
        alone.learn(x[part], y[part])
    torch.testing.assert_close(together.heads(x)[2], alone.heads(x)[0])


def test_the_rate_is_chosen_on_held_out_rows_and_a_diverged_head_never_is():
    x, y = rows(noise=0.2)
    recipe = LinearRecipe(rates=(1e-9, 1.0, 3e38), epochs=20, batch=20, batch_norm=False)
    probe = LinearProbe(F, C, recipe=recipe)
    probe.fit(x, y)
    assert probe.rates == (1.0,)
    assert set(probe.sweep) == {1e-9, 1.0, 3e38}
    assert probe.sweep[3e38] == -1
    assert "1 x batch/256, the best of 3 on 10% of train" in probe.protocol


def test_the_chosen_head_is_trained_on_all_rows():
    x, y = rows()
    chosen = LinearProbe(F, C, recipe=replace(PLAIN, rates=(1e-6, 1.0), epochs=5))
    chosen.fit(x, y)
    alone = LinearProbe(F, C, recipe=replace(PLAIN, rates=chosen.rates, epochs=5))
    alone.fit(x, y)
    assert torch.equal(chosen.weight, alone.weight)


def test_held_out_rows_do_not_train_the_sweep():
    """Random labels cannot be predicted: a sweep that saw its held-out rows would do better."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 200, generator=generator), torch.arange(60) % C
    probe = LinearProbe(
        200, C, recipe=LinearRecipe(rates=(1.0, 3.0), epochs=100, batch=64, holdout=0.5)
    )
    probe.fit(x, y)
    assert probe.predict(x).argmax(1).eq(y).float().mean() > 0.95
    assert max(probe.sweep.values()) < 0.6


def test_the_same_numbers_twice_and_no_global_random_number():
    x, y = rows()
    recipe = LinearRecipe(rates=(0.1, 1.0), epochs=3, batch=16)
    state = torch.get_rng_state()
    first, second, other = (
        LinearProbe(F, C, recipe=replace(recipe, seed=seed)) for seed in (0, 0, 1)
    )
    for probe in (first, second, other):
        probe.fit(x, y)
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, other.weight)
    assert torch.equal(state, torch.get_rng_state())


def test_fit_starts_from_scratch():
    x, y = rows()
    probe = LinearProbe(F, C, recipe=replace(PLAIN, epochs=3))
    probe.fit(x, y)
    weight = probe.weight.clone()
    probe.fit(x, y)
    assert torch.equal(weight, probe.weight)


def test_statistics_of_features_are_exact_even_after_few_steps():
    x, y = rows()
    probe = LinearProbe(F, C, recipe=replace(PLAIN, batch_norm=True, batch=N))
    probe.fit(100 + x, y)
    torch.testing.assert_close(probe.mean, 100 + x.mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(probe.variance, x.var(0), rtol=1e-3, atol=0)


def test_it_works_under_inference_mode_and_can_be_trained_on_afterwards():
    x, y = rows()
    with torch.inference_mode():
        inside = LinearProbe(F, C, recipe=PLAIN)
        inside.fit(x, y)
    outside = LinearProbe(F, C, recipe=PLAIN)
    outside.fit(x, y)
    assert torch.equal(inside.weight, outside.weight)
    inside.learn(x, y)
    inside.load_state_dict(outside.state_dict())


def test_no_head_is_guessed_before_one_is_chosen():
    with pytest.raises(UserError, match="2 rates and none is chosen"):
        LinearProbe(F, C, recipe=replace(PLAIN, rates=(0.1, 1.0))).predict(torch.randn(4, F))


def test_features_that_are_not_finite_are_named():
    x, y = rows()
    probe = LinearProbe(F, C, recipe=replace(PLAIN, rates=(0.1, 1.0)))
    with pytest.raises(UserError, match="diverged; check that the features are finite"):
        probe.fit(x.where(x < 2, torch.nan), y)


def test_a_single_rate_that_diverges_is_named():
    x, y = rows()
    with pytest.raises(UserError, match=r"every learning rate of \[3e\+38\] diverged"):
        LinearProbe(F, C, recipe=replace(PLAIN, rates=(3e38,), epochs=5)).fit(100 * x, y)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rates": ()},
        {"rates": (0.1, -1.0)},
        {"epochs": 0},
        {"batch": 1},
        {"warmup": 1.0},
        {"holdout": 0.0},
        {"momentum": 1.0},
        {"weight_decay": -0.1},
        {"init_std": -0.1},
    ],
)
def test_a_wrong_recipe_is_named(wrong: dict):
    (name,) = wrong
    with pytest.raises(UserError, match=f"linear probe: {name} is .* allowed is .* set {name}"):
        LinearRecipe(**wrong)


def test_too_few_rows_are_named():
    with pytest.raises(UserError, match="3 labelled images"):
        LinearProbe(F, C).fit(*rows(3))
