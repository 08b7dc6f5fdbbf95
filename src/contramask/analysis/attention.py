"""What attention looks at, block by block and head by head.

Distance and mutual information as Park et al., 2023 (arXiv:2305.00729), diversity after Huang et
al., 2025 (arXiv:2403.02233), similarities of heads, depths and positions after figure 5 of the
former, of which the code is not published: mean cosines of what heads read, `attention @ v`.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from contramask.analysis.analysis import Analysis, Seen, Tap
from contramask.analysis.reading import Reading
from contramask.functional.attention import (
    DISTANCE_EPS,
    NMI_EPS,
    among_patches,
    distance,
    diversity,
    entropies,
    head_similarity,
    mutual_information,
    to_prefix,
)
from contramask.models.attention import Attended
from contramask.types import Spec

# Images whose maps are at hand at once: several statistics pass over them while they are in cache.
SLICE = 8

# name -> unit, sentence. Those before the bar have a value for each head.
BY_HEAD = {
    "distance": ("px", "mean distance of a patch and what it attends to (arXiv:2305.00729)"),
    "entropy": ("nats", "entropy of a query's map over patches"),
    "nmi": ("", "normalised mutual information of query and key; 0: collapse (arXiv:2305.00729)"),
    "diversity": ("", "1 - cosine of the maps of two queries; 0: collapse (arXiv:2403.02233)"),
}
PREFIX = {
    "to_cls": ("", "attention of patches to the class token"),
    "to_registers": ("", "attention of patches to all registers together"),
}
SIMILARITY = {
    "head_similarity": ("", "cosine of one query's maps in two heads"),
    "output_similarity_heads": ("", "cosine of what two heads read for one token"),
    "output_similarity_positions": ("", "cosine of what one head reads for two patches"),
    "output_similarity_depths": ("", "cosine of what a head reads with the block before"),
}


class AttentionStatistics(Analysis):
    """Distance, entropy, mutual information, diversity and similarities of attention.

    The class token and registers are dropped and rows sum to one again, as in the papers. One
    block's maps are held at a time.

    Args:
        images: the most images that are looked at.
        replicates: see `Analysis`.
    """

    def __init__(self, *, images: int | None = None, replicates: int = 0):
        super().__init__(replicates=replicates)
        self.images = images
        self._before: Tensor | None = None
        self._prefix = 0

    def taps(self, spec: Spec) -> Mapping[str, Tap]:
        return {"attention": Tap("attention", "*", lambda a, label: self._shrink(a, label, spec))}

    def update(self, seen: Seen) -> None:
        self.add_means("sums", self.stacked(seen, "attention"), seen.weights)
        self._before = None

    def readings(self) -> list[Reading]:
        value, low, high = self.means("sums")  # (layers, statistics, heads)
        layers = self.layers["attention"]
        heads = tuple(map(str, range(value.shape[2])))
        found = []
        for i, (name, (unit, about)) in enumerate({**BY_HEAD, **PREFIX, **SIMILARITY}.items()):
            if self._prefix < {"to_cls": 1, "to_registers": 2}.get(name, 0):
                continue
            gone = torch.zeros(len(layers), dtype=torch.bool)
            gone[0] = name == "output_similarity_depths"
            tables = [None if t is None else t[:, i] for t in (value, low, high)]
            means = [None if t is None else t.mean(-1) for t in tables]
            found.append(_reading(f"attn/{name}", {"layer": layers}, means, unit, about, gone))
            if name in BY_HEAD or name in PREFIX:
                axes = {"layer": layers, "head": heads}
                found.append(_reading(f"attn/{name}_by_head", axes, tables, unit, about))
        return found

    def _shrink(
        self, attended: Attended, label: str, spec: Spec
    ) -> Float[Tensor, "B statistics H"]:
        before, self._before = self._before, attended.output
        self._prefix = attended.maps.shape[-1] - spec.patches
        if label == "block_00":
            before = None
        parts = []
        for i in range(0, len(attended.maps), SLICE):
            part = Attended(*(t[i : i + SLICE].float() for t in attended))
            earlier = None if before is None else before[i : i + SLICE].float()
            parts.append(statistics(part, earlier, spec))
        return torch.cat(parts)


def _reading(
    name: str,
    axes: Mapping[str, tuple[str, ...]],
    tables: list[Tensor | None],
    unit: str,
    about: str,
    gone: Tensor | None = None,
) -> Reading:
    value, low, high = tables
    assert value is not None
    none = torch.zeros((), dtype=torch.bool)
    missing = none if gone is None else gone
    return Reading(name, axes, value, unit, about, low, high, missing=missing)


def statistics(
    attended: Attended, before: Float[Tensor, "B H T d"] | None, spec: Spec
) -> Float[Tensor, "B statistics H"]:
    """All statistics in the order of the tables above; 0 where there is none.

    Args:
        attended: of one block.
        before: what heads read in the block before; None: this is the first.
        spec: with the grid of the images.
    """
    maps, output = attended
    prefix, (b, heads) = maps.shape[-1] - spec.patches, maps.shape[:2]
    among = among_patches(maps, prefix, DISTANCE_EPS)
    # As the authors: what is added decides where the class token takes nearly all attention.
    softened = among_patches(maps, prefix, NMI_EPS)
    nothing = maps.new_zeros((b, heads))
    front = to_prefix(maps, prefix)
    read = normalize(output[:, :, prefix:], dim=-1)  # (B, H, N, d)
    rows = [
        distance(among, spec.grid, spec.patch),
        entropies(among).mean(-1),
        mutual_information(softened, entropies(softened)),
        diversity(among),
        front[..., 0] if prefix else nothing,
        front[..., 1:].sum(-1) if prefix > 1 else nothing,
        head_similarity(among)[:, None].expand(-1, heads),
        pairs_cosine(read.transpose(1, 2)).mean(-1, keepdim=True).expand(-1, heads),
        pairs_cosine(read),
        nothing if before is None else _with(read, before[:, :, prefix:]),
    ]
    return torch.stack([row.to(maps) for row in rows], 1)


def pairs_cosine(unit: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b"]:
    """Mean cosine of two of n unit rows; 0 where there is but one."""
    n = unit.shape[-2]
    total = unit.sum(-2).square().sum(-1)
    own = unit.square().sum((-2, -1))  # n, or less where a row is zero
    return (total - own) / max(n * (n - 1), 1)


def _with(unit: Float[Tensor, "B H N d"], other: Float[Tensor, "B H N d"]) -> Tensor:
    return (unit * normalize(other, dim=-1)).sum(-1).mean(-1)
