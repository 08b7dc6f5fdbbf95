"""SimCLR from tokens to the loss, against a loop in NumPy: heads, batch norm view by view, sums."""

import numpy as np
import pytest
import torch

from contramask.objectives.simclr import SimCLR
from contramask.types import Batch, Spec, Step, Tokens
from tests.builders import randn

SPEC = Spec(dim=6, patch=4, grid=(1, 2), depth=1)
B = 5


def built(**changes):
    torch.manual_seed(0)
    return SimCLR(SPEC, **{"hidden": 9, "out": 4} | changes).train()


def loss_of(objective, cls):
    batch = Batch(
        views={"global": torch.zeros(2, B, 3, 4, 8)}, label=torch.zeros(B).long(), position=0
    )
    tokens = Tokens(cls.flatten(0, 1)[:, None], torch.zeros(2 * B, 2, 6))
    return objective({objective.passes[0]: tokens}, batch, Step(0, 0.0))


def projected(head, x):
    """Linear, batch norm, ReLU, twice; linear, batch norm with scale and without shift."""
    for i, last in ((0, False), (3, False), (6, True)):
        x = x @ head[i].weight.detach().double().numpy().T
        x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)  # statistics of one view
        x = x if last else np.maximum(x, 0)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize(("temperature", "scale"), [(0.1, 1.0), (0.5, 0.5)])
def test_against_a_loop(temperature, scale):
    objective = built(temperature=temperature, scale=scale)
    cls = randn(2, B, 6) * torch.tensor([1.0, 3.0])[:, None, None]
    views = [projected(objective.head, x.double().numpy()) for x in cls]
    total = 0.0
    for mine, theirs in ((0, 1), (1, 0)):
        for i in range(B):
            s = {("x", j): views[mine][i] @ views[theirs][j] for j in range(B)}
            s |= {("w", j): views[mine][i] @ views[mine][j] for j in range(B) if j != i}
            everyone = sum(np.exp(v / temperature) for v in s.values())
            total -= np.log(np.exp(s["x", i] / temperature) / everyone) / B
    loss = loss_of(objective, cls)
    assert loss.value.item() == pytest.approx(scale * total, rel=1e-4)
    expected = np.mean([a @ b for a, b in zip(*views, strict=True)])
    assert loss.logs["similarity"].item() == pytest.approx(expected, abs=1e-4)


def test_head():
    assert [m.out_features for m in built().head if isinstance(m, torch.nn.Linear)] == [9, 9, 4]
    paper = SimCLR(SPEC, layers=2, out=4).head
    assert [m.out_features for m in paper if isinstance(m, torch.nn.Linear)] == [6, 4]
    big = SimCLR(Spec(dim=64, patch=4, grid=(1, 2), depth=1)).head
    assert big[0].weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_running_statistics_see_each_view():
    objective, cls = built(), randn(2, B, 6)
    loss_of(objective, cls)
    inputs = [x @ objective.head[0].weight.T for x in cls]
    expected = 0.9 * (0.1 * inputs[0].mean(0)) + 0.1 * inputs[1].mean(0)
    torch.testing.assert_close(objective.head[1].running_mean, expected.detach())
