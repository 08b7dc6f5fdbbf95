"""Projection and prediction heads of contrastive objectives."""

from itertools import pairwise
from typing import Literal

from torch import nn


def mlp(
    *widths: int, last: Literal["none", "batch_norm", "batch_norm_no_bias", "plain_batch_norm"]
) -> nn.Sequential:
    """Linear, batch norm, ReLU, ..., Linear, and a last norm; no linear layer has a bias.

    Args:
        widths: of the layers, input first: `mlp(384, 4096, 4096, 256, last=...)` has three.
        last: the norm after the last layer: an affine batch norm, one without its bias (SimCLR v2:
            "centre off"), or one without affine parameters (`plain_batch_norm`, MoCo v3).
    """
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths), start=1):
        layers.append(nn.Linear(a, b, bias=False))
        if i < len(widths) - 1:
            layers += [nn.BatchNorm1d(b), nn.ReLU(inplace=True)]
    if last != "none":
        norm = nn.BatchNorm1d(widths[-1], affine=last != "plain_batch_norm")
        if last == "batch_norm_no_bias":
            norm.bias.requires_grad_(False)
        layers.append(norm)
    return nn.Sequential(*layers)
