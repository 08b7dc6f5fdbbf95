"""Images to the features that probes read: one function, to train and to score, on and offline.

Features come from a backbone in eval mode, without gradient, in float32. Linear probes, banks of
k-NN, dense probes and the analyses of depth all read through this file, so that no two of them can
mean different features by one name.
"""

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from contramask.errors import need_one_of
from contramask.models.backbone import Backbone
from contramask.types import Spec, Tokens, UserError

Pool = Literal["cls", "mean", "cls+mean"]
Norm = Literal["final", "none"]

# The view that probes read: one crop of each image, without augmentation.
CLEAN = "clean"

_SOURCE = re.compile(r"last([1-9]\d*)?|block_(\d+)")


@dataclass(frozen=True)
class Feature:
    """Which feature of an image: where in depth, how its tokens become one vector, and how normed.

    Attributes:
        source: `last`, the last block; `last4`, the last four side by side, shallow first (DINO);
            `block_07`, the output of that block, counted from 0.
        pool: `cls` (MAE, MoCo v3, DINO); `mean` of the patches, without class token and registers;
            `cls+mean`, both side by side; of several blocks all class tokens and the mean of the
            last (iBOT, DINOv2).
        norm: `final`, the backbone's last norm over the tokens of every block that is read, before
            they are pooled (DINO); `none`, the blocks' outputs as they are (BEiT).

    Raises:
        UserError: for any other word.
    """

    source: str = "last"
    pool: Pool = "cls"
    norm: Norm = "final"

    def __post_init__(self) -> None:
        if not _SOURCE.fullmatch(self.source):
            raise UserError(
                f"feature: source is {self.source!r}; allowed are last, last4 (so many blocks) and "
                "block_07 (counted from 0); set source"
            )
        need_one_of(self.pool, Pool, "feature: pool", "pool")
        need_one_of(self.norm, Norm, "feature: norm", "norm")

    @classmethod
    def parse(cls, text: str) -> "Feature":
        """`SOURCE/POOL/NORM`; last words may be missing: `last4/cls`, `block_07/mean/none`."""
        words = text.split("/")
        if len(words) > 3:
            raise UserError(f"feature: {text!r} is no SOURCE/POOL/NORM such as last4/cls/final")
        for word, allowed, name in zip(words[1:], (Pool, Norm), ("pool", "norm"), strict=False):
            need_one_of(word, allowed, f"feature: {name}", name)
        return cls(*words)  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        return f"{self.source}/{self.pool}/{self.norm}"

    def about(self) -> str:
        """In words, for a protocol."""
        found = _SOURCE.fullmatch(self.source)
        assert found is not None
        where = f"the last {found[1]} blocks" if found[1] else self.source.replace("_", " ")
        if self.source in ("last", "last1"):
            where = "the last block"
        what = {"cls": "class token", "mean": "mean of patches", "cls+mean": "class token and mean"}
        normed = "after the final norm" if self.norm == "final" else "without the final norm"
        return f"{what[self.pool]} of {where} {normed}"

    def blocks(self, depth: int) -> tuple[int, ...]:
        """The blocks that are read, from 0, shallow first. Raises `UserError` if one is missing."""
        found = _SOURCE.fullmatch(self.source)
        assert found is not None
        count, block = int(found[1] or 1), found[2]
        first, last = (depth - count, depth - 1) if block is None else (int(block), int(block))
        if first < 0 or last >= depth:
            raise UserError(
                f"feature: source is {self.source!r}; the backbone has {depth} blocks, block_00 to "
                f"block_{depth - 1:02d}; set source"
            )
        return tuple(range(first, last + 1))

    def width(self, spec: Spec) -> int:
        """F, the length of the feature."""
        return spec.dim * (len(self.blocks(spec.depth)) + (self.pool == "cls+mean"))


# What is read unless something else is asked for.
CLS = Feature()


def features(
    backbone: Backbone,
    images: Float[Tensor, "B 3 H W"],
    *,
    source: str = "last",
    pool: Pool = "cls",
    norm: Norm = "final",
) -> Float[Tensor, "B F"]:
    """One feature of images; see `Feature` for the words.

    Args:
        backbone: in eval mode, see `frozen`.
        images: normalised.
        source: where in depth, see `Feature`.
        pool: how tokens become one vector.
        norm: the backbone's final one, or none.

    Raises:
        UserError: for `cls` of a backbone that has no class token, or a block it does not have.
    """
    return feature_set(backbone, images, [Feature(source, pool, norm)])[0]


def feature_set(
    backbone: Backbone, images: Float[Tensor, "B 3 H W"], wanted: Sequence[Feature]
) -> list[Float[Tensor, "B _"]]:
    """Several features of images from one forward, in the order of `wanted`; see `features`."""
    read = _read_blocks(backbone, images, wanted)
    return [_vector(read, f, backbone.spec) for f in wanted]


def patch_features(
    backbone: Backbone,
    images: Float[Tensor, "B 3 H W"],
    *,
    source: str = "last",
    norm: Norm = "final",
) -> Float[Tensor, "B N F"]:
    """The patches of images, row by row, in place of one vector; of several blocks side by side."""
    return patch_feature_set(backbone, images, [source], norm=norm)[0]


def patch_feature_set(
    backbone: Backbone,
    images: Float[Tensor, "B 3 H W"],
    sources: Sequence[str],
    *,
    norm: Norm = "final",
) -> list[Float[Tensor, "B N _"]]:
    """The patches of several sources from one forward, in their order; see `patch_features`."""
    wanted = [Feature(source, "mean", norm) for source in sources]
    read = _read_blocks(backbone, images, wanted)
    blocks = [feature.blocks(backbone.spec.depth) for feature in wanted]
    return [torch.cat([read[b, norm][1].float() for b in some], dim=2) for some in blocks]


def pooled(
    prefix: Float[Tensor, "B R D"], patches: Float[Tensor, "B N D"], pool: Pool
) -> Float[Tensor, "B F"]:
    """Tokens to one vector. Raises `UserError` for the class token of a backbone without one."""
    if "cls" in pool and prefix.shape[1] == 0:
        raise UserError(
            f"features: pool is {pool!r}, but this backbone has no class token; allowed is mean; "
            "set pool"
        )
    parts = [prefix[:, 0].float()] if "cls" in pool else []
    if "mean" in pool:
        parts.append(patches.float().mean(1))
    return torch.cat(parts, dim=1)


_Read = dict[tuple[int, str], tuple[Tensor, Tensor]]


def _read_blocks(backbone: Backbone, images: Tensor, wanted: Sequence[Feature]) -> _Read:
    """(block, norm) -> (prefix, patches)."""
    assert not backbone.training, "features are read in eval mode: with frozen(backbone): ..."
    last = backbone.spec.depth - 1
    asked = {(b, f.norm) for f in wanted for b in f.blocks(last + 1)}
    inner = sorted({b for b, norm in asked if (b, norm) != (last, "final")})
    tokens: Tokens = backbone(images, layers=tuple(inner))
    count, read = tokens.prefix.shape[1], {}
    for block, norm in asked:
        if (block, norm) == (last, "final"):
            read[block, norm] = (tokens.prefix, tokens.patch)
            continue
        x = tokens.layers[block]
        x = backbone.normed(x) if norm == "final" else x
        read[block, norm] = (x[:, :count], x[:, count:])
    return read


def _vector(read: _Read, feature: Feature, spec: Spec) -> Float[Tensor, "B F"]:
    blocks = feature.blocks(spec.depth)
    if feature.pool != "cls+mean":
        return torch.cat([pooled(*read[b, feature.norm], feature.pool) for b in blocks], dim=1)
    parts = [pooled(*read[b, feature.norm], "cls") for b in blocks]
    return torch.cat([*parts, pooled(*read[blocks[-1], feature.norm], "mean")], dim=1)


@contextmanager
def frozen(module: nn.Module) -> Generator[None]:
    """Eval mode and no gradient; afterwards every submodule has its own mode again."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        # One by one: train() would set all submodules alike.
        for part, mode in modes:
            part.training = mode
