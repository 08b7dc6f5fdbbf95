"""Linear CKA of two networks from their Gram matrices, and what is read off its map.

Minibatch CKA with unbiased HSIC (Nguyen et al., 2021, arXiv:2010.15327), as Shekhar et al., 2023
(arXiv:2304.13089) compare ViTs; their cast of HSIC to an integer is not copied.
"""

import re

import torch
from jaxtyping import Float
from torch import Tensor

from contramask.analysis.analysis import interval
from contramask.analysis.grams import BLOCK, GramStack
from contramask.analysis.reading import Reading
from contramask.distributed import rank, total
from contramask.functional.cka import cka, hsic, hsic_of_pairs
from contramask.types import UserError, fold

FEWEST = 8  # minibatches that intervals can come from
_LAYER = re.compile(r"block_(\d+)(?:\.(.*))?$")


def compare(
    a: GramStack, b: GramStack, *, replicates: int = 0, via: torch.device | None = None
) -> list[Reading]:
    """CKA of every layer of one network with every layer of the other, and its summaries.

    Args:
        a: of one network.
        b: of the other, over the same minibatches. On several ranks each brings its own.
        replicates: bootstrap samples of minibatches, for intervals of the summaries.
        via: the device the process group speaks through (NCCL: the GPU); None: the host.

    Returns:
        `cka/POOL/CLEANING`, and with this prefix `same_depth`, `same_depth_mean`, `by_distance`
        (summaries of layers of one kind) and `correspondence`; only the first if depths differ.

    Raises:
        UserError: if they are not of the same minibatches, or were taken in different ways.
    """
    if a.name != b.name or a.keys != b.keys:
        shared = len(set(a.keys) & set(b.keys))
        raise UserError(
            f"cka: one side is {a.name} over {len(a.keys)} minibatches, the other {b.name} over "
            f"{len(b.keys)}, of which {shared} are the same; take both in the same way from the "
            "same images"
        )
    sums = _sums(a.table, b.table, replicates, via)
    if len(a.keys) < FEWEST:  # of so few a replicate may be empty, and an interval says nothing
        sums = sums[:1]
    value, missing = zip(*(cka(*parts) for parts in sums), strict=True)
    table, gone = torch.stack(value), missing[0]
    axes = {"layer_a": a.labels, "layer_b": b.labels}
    about = "linear CKA, unbiased HSIC of minibatches (arXiv:2010.15327, arXiv:2304.13089)"
    whole = Reading(f"cka/{a.name}", axes, table[0], "", about, missing=gone)
    return [whole, *_summaries(a, b, table, gone)]


def _sums(
    a: Float[Tensor, "G L n n"],
    b: Float[Tensor, "G M n n"],
    replicates: int,
    via: torch.device | None,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """HSIC of layers across and within, summed over minibatches: of the sample, then replicates."""
    generator = torch.Generator().manual_seed(fold("minibatches", rank()))
    weights = torch.ones(1 + replicates, len(a), dtype=torch.float64)
    weights[1:] = torch.poisson(weights[1:], generator=generator)
    l, m = a.shape[1], b.shape[1]
    sums = torch.zeros(1 + replicates, l * m + l + m, dtype=torch.float64)
    for x, y, w in zip(a, b, weights.T, strict=True):
        x, y = x.double(), y.double()
        row = torch.cat([hsic(x, y).flatten(), hsic_of_pairs(x, x), hsic_of_pairs(y, y)])
        sums.addr_(w, row)
    sums = total(sums.to(via or sums.device)).cpu()
    return [(s[: l * m].view(l, m), s[l * m : l * m + l], s[l * m + l :]) for s in sums]


def _summaries(
    a: GramStack, b: GramStack, table: Float[Tensor, "R L M"], gone: Tensor
) -> list[Reading]:
    """What can be read along the depth, for layers of the same kind."""
    places = [_places(a.labels), _places(b.labels)]
    kinds = [k for k in places[0] if k in places[1]]
    depth = {len(p[k]) for p in places for k in kinds}
    if len(depth) != 1 or not kinds:
        return []
    n, name = depth.pop(), f"cka/{a.name}"
    rows, columns = (torch.tensor([p[k] for k in kinds]) for p in places)  # (kinds, n)
    # (R, kinds, n, n): depth against depth, layers of one kind
    maps = table[:, rows[:, :, None], columns[:, None, :]]
    there = ~gone[rows[:, :, None], columns[:, None, :]]
    blocks = tuple(f"block_{i:02d}" for i in range(n))
    same, same_there = maps.diagonal(dim1=2, dim2=3), there.diagonal(dim1=1, dim2=2)
    value, low, high = interval(same)
    axes = {"sublayer": tuple(kinds), "layer": blocks}
    about = "CKA of the same place at the same depth (arXiv:2304.13089)"
    readings = [
        Reading(f"{name}/same_depth", axes, value, "", about, low, high, missing=~same_there)
    ]
    # The paper's means are over its nine places, without block outputs.
    own = torch.tensor([k != BLOCK for k in kinds])
    own = own if own.any() else ~own
    maps, there = maps[:, own], there[own]
    distance = (torch.arange(n)[:, None] - torch.arange(n)).abs()
    means = torch.stack([_mean(maps, there & (distance == d)) for d in range(n)], 1)  # (R, n)
    value, low, high = interval(means)
    about = "mean CKA of layers of one kind whose depths differ by so much (arXiv:2304.13089)"
    axes = {"distance": tuple(map(str, range(n)))}
    readings.append(Reading(f"{name}/by_distance", axes, value, "", about, low, high))
    value, low, high = interval(means[:, 0])
    about = "mean CKA at the same depth (arXiv:2304.13089)"
    readings.append(Reading(f"{name}/same_depth_mean", {}, value, "", about, low, high))
    best = maps[0].mean(0).argmax(1).double()
    about = "depth of the other network that is most like this one, kinds of layers averaged"
    readings.append(Reading(f"{name}/correspondence", {"layer_a": blocks}, best, "", about))
    return readings


def _mean(maps: Float[Tensor, "R k n n"], where: Tensor) -> Float[Tensor, " R"]:
    return (maps * where).sum((1, 2, 3)) / where.sum().clamp(min=1)


def _places(labels: tuple[str, ...]) -> dict[str, list[int]]:
    """Kind of layer -> where its layers are, by depth."""
    places: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        found = _LAYER.fullmatch(label)
        assert found, label
        places.setdefault(found[2] or BLOCK, []).append(i)
    return places
