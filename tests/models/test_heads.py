"""Projection heads: layers in their order, no biases, the three last norms."""

import pytest
import torch
from torch import nn

from contramask.models.heads import mlp
from tests.builders import randn


def kinds(head):
    return [type(m).__name__ for m in head]


@pytest.mark.parametrize("last", ["none", "batch_norm", "batch_norm_no_bias", "plain_batch_norm"])
def test_layers(last):
    head = mlp(5, 7, 11, 3, last=last)
    inner = ["Linear", "BatchNorm1d", "ReLU"]
    assert kinds(head) == [*inner, *inner, "Linear", *(["BatchNorm1d"] if last != "none" else [])]
    widths = [(m.in_features, m.out_features) for m in head if isinstance(m, nn.Linear)]
    assert widths == [(5, 7), (7, 11), (11, 3)]
    assert not any(m.bias is not None for m in head if isinstance(m, nn.Linear))
    assert head(randn(4, 5)).shape == (4, 3)


def test_last_norms():
    plain = mlp(5, 3, last="plain_batch_norm")[-1]
    assert plain.weight is None
    assert plain.bias is None
    affine = mlp(5, 3, last="batch_norm")[-1]
    assert affine.weight.requires_grad
    assert affine.bias.requires_grad
    centred = mlp(5, 3, last="batch_norm_no_bias")[-1]
    assert centred.weight.requires_grad
    assert not centred.bias.requires_grad
    assert not centred.bias.any()


def test_against_a_loop():
    head, x = mlp(5, 7, 3, last="plain_batch_norm").train(), randn(6, 5)

    def normalised(h):
        return (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()

    h = normalised(x @ head[0].weight.T).clamp(min=0)
    expected = normalised(h @ head[3].weight.T)
    torch.testing.assert_close(head(x), expected, atol=1e-5, rtol=1e-5)
