"""How the terms of a loss pull at the backbone they share: norms and cosines of their gradients."""

from collections.abc import Callable, Iterable, Mapping
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from contramask.distributed import mean
from contramask.objectives.objective import Feats, Objective
from contramask.training.dropout import seed_layers
from contramask.types import Batch, Step


def balance(
    encode: Callable[[Batch, Step], Feats],
    terms: Mapping[str, Objective],
    weights: Mapping[str, float],
    shared: Iterable[nn.Parameter],
    batch: Batch,
    step: Step,
) -> dict[str, Tensor]:
    """Norm of each term's gradient and cosine of each pair, over the parameters they share.

        NAME/grad_norm           |g|, g the gradient of the term by itself, mean over ranks
        NAME/weighted_grad_norm  weight |g|: what it contributes
        cosine/NAME/OTHER        g . g' / (|g| |g'|); below 0 they fight

    Args:
        encode: computes the passes of a batch.
        terms: the objectives by name.
        weights: of the terms at this moment.
        shared: the backbone's parameters; those that are fixed are left out.
        batch: of this rank.
        step: its place.
    """
    parameters = [p for p in shared if p.requires_grad]
    found = _gradients(encode(batch, step), terms, parameters, batch, step)
    norms = {name: g.norm() for name, g in found.items()}
    shown = {f"{name}/grad_norm": norm for name, norm in norms.items()}
    shown |= {f"{name}/weighted_grad_norm": weights[name] * n for name, n in norms.items()}
    tiny = torch.finfo(torch.float32).tiny
    for a, b in combinations(found, 2):
        product = norms[a] * norms[b]
        shown[f"cosine/{a}/{b}"] = found[a] @ found[b] / product.clamp(min=tiny)
    return shown


def _gradients(
    feats: Feats,
    terms: Mapping[str, Objective],
    parameters: list[nn.Parameter],
    batch: Batch,
    step: Step,
) -> dict[str, Float[Tensor, " P"]]:
    """The gradient of each term as one vector, mean over ranks."""
    found = {}
    for name, term in terms.items():
        seed_layers(step, name, parameters[0].device)
        value = term(feats, batch, step).value
        grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        parts = zip(grads, parameters, strict=True)
        rows = [torch.zeros_like(p) if g is None else g for g, p in parts]
        found[name] = mean(torch.cat([g.float().flatten() for g in rows]))
    return found
