"""One vector for an image at every depth: class token and mean of patches, block by block."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from contramask.analysis.analysis import Tap
from contramask.probes.features import Pool, pooled
from contramask.types import Spec, Tokens

FEATURES: tuple[Pool, ...] = ("cls", "mean")


def features_of(prefix: int) -> tuple[Pool, ...]:
    """Which features there are with so many tokens that are no patches."""
    return FEATURES if prefix else FEATURES[1:]


def pooled_taps(spec: Spec, view: str = "plain") -> dict[str, Tap]:
    """Taps that read (B, features, D) after every block and after the final norm, in float32."""

    def block(tokens: Float[Tensor, "B T D"], label: str) -> Float[Tensor, "B F D"]:
        prefix = tokens.shape[1] - spec.patches
        return _pool(tokens[:, :prefix], tokens[:, prefix:])

    def final(tokens: Tokens, label: str) -> Float[Tensor, "B F D"]:
        return _pool(tokens.prefix, tokens.patch)

    return {
        f"{view}/blocks": Tap("output", "blocks.*", block, view),
        f"{view}/final": Tap("tokens", "*", final, view),
    }


def stack(
    found: Mapping[str, Mapping[str, Tensor]], view: str = "plain"
) -> tuple[Float[Tensor, "B F L D"], tuple[str, ...]]:
    """What these taps found, with the layers in the order of depth, `final` last."""
    layers = {**found[f"{view}/blocks"], **found[f"{view}/final"]}
    return torch.stack(list(layers.values()), 2), tuple(layers)


def _pool(prefix: Tensor, patches: Tensor) -> Float[Tensor, "B F D"]:
    pools = features_of(prefix.shape[1])
    return torch.stack([pooled(prefix, patches, pool) for pool in pools], 1)
