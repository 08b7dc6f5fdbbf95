"""Projection, prediction and prototype heads of objectives."""

import math
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from contramask.errors import UserError, need_one_of
from contramask.types import Spec, Tokens


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


class PrototypeHead(nn.Module):
    """Scores of K prototypes: the head of DINO, iBOT and DINOv2 (arXiv:2104.14294, appendix C).

        x -> MLP with GELU -> bottleneck -> length 1 -> prototypes of length g

    Args:
        dim: width of the tokens.
        out: prototypes, K.
        hidden: width of the hidden layers.
        bottleneck: width before the prototypes.
        layers: of the MLP.
        fixed_length: g stays 1 (`norm_last_layer` of the official code); else it is learned.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        fixed_length: bool = True,
    ):
        super().__init__()
        widths = [dim, *[hidden] * (layers - 1), bottleneck]
        parts: list[nn.Module] = []
        for a, b in pairwise(widths):
            parts += [nn.Linear(a, b), nn.GELU()]
        self.mlp = nn.Sequential(*parts[:-1])
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = prototypes(bottleneck, out, fixed_length=fixed_length)

    def embed(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B E"]:
        """The point on the sphere that the prototypes are compared with."""
        # 1e-6 and not 1e-12, which half precision rounds to 0.
        return F.normalize(self.mlp(x), dim=-1, eps=1e-6)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B K"]:
        return self.last_layer(self.embed(x))


def prototypes(dim: int, out: int, *, fixed_length: bool) -> nn.Module:
    """A linear layer without bias, of length and direction of each row (weight normalisation)."""
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(dim, out, bias=False))
    length = layer.parametrizations.weight.original0  # pyright: ignore
    assert isinstance(length, nn.Parameter)
    nn.init.ones_(length)
    length.requires_grad_(not fixed_length)
    return layer


Sharing = Literal["shared", "split", "separate"]


class TokenHeads(nn.Module):
    """Prototypes for class tokens and for patches.

    Args:
        dim: width of the tokens.
        out: prototypes of class tokens.
        patch_out: prototypes of patches; None: `out`.
        sharing: `shared`, one head; `split`, one MLP and two sets of prototypes; `separate`.
        hidden: width of the hidden layers.
        bottleneck: width before the prototypes.
        fixed_length: prototypes keep length 1.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        patch_out: int | None = None,
        *,
        sharing: Sharing,
        hidden: int,
        bottleneck: int,
        fixed_length: bool,
    ):
        super().__init__()
        need_one_of(sharing, Sharing, "heads: sharing", "model.objectives.NAME.init_args.sharing")
        self.sharing, patches = sharing, patch_out or out
        if sharing == "shared" and patches != out:
            raise UserError(
                f"a shared head has {out} prototypes, given patch_out {patches} for patches; "
                "set sharing to split or separate, or leave patch_out out"
            )
        sizes = {"hidden": hidden, "bottleneck": bottleneck, "fixed_length": fixed_length}
        self.cls = PrototypeHead(dim, out, **sizes)
        if sharing == "separate":
            self.patch = PrototypeHead(dim, patches, **sizes)
        elif sharing == "split":
            # "last_layer" is in the name, so that one rule freezes both, as in the authors' code.
            self.last_layer2 = prototypes(bottleneck, patches, fixed_length=fixed_length)

    def forward(
        self, x: Float[Tensor, "*B D"], kind: Literal["cls", "patch"]
    ) -> Float[Tensor, "*B K"]:
        if kind == "cls" or self.sharing == "shared":
            return self.cls(x)
        return self.patch(x) if self.sharing == "separate" else self.last_layer2(self.cls.embed(x))

    @torch.no_grad()
    def lend(self, other: nn.Module) -> None:
        """Give the prototypes of patches to the class tokens of `other`, a copy of this."""
        assert isinstance(other, TokenHeads)
        own = None if self.sharing != "split" else dict(self.last_layer2.named_parameters())
        theirs = dict(other.cls.last_layer.named_parameters())
        if own is None or any(own[k].shape != v.shape for k, v in theirs.items()):
            raise UserError(
                "teacher_shares is for a split head with equally many prototypes for class tokens "
                "and patches; set sharing: split and leave patch_out out"
            )
        for name, parameter in theirs.items():
            parameter.copy_(own[name])


class BlockReader(nn.Module):
    """What an objective reads of a pass: its last tokens, or those of an earlier block, normalised.

    Args:
        spec: of the backbone.
        block: number of the block from 0, whose output is read through a layer norm of its own, or
            the fraction of the depth that it ends: 0.5 of 12 blocks is block 5. None: the last
            tokens as they are, and this module does nothing.
    """

    def __init__(self, spec: Spec, block: int | float | None):
        super().__init__()
        if isinstance(block, float) and 0 < block < 1:
            block = math.ceil(block * spec.depth) - 1
        if block is not None and (block not in range(spec.depth)):
            raise UserError(
                f"layer is {block}, the backbone has blocks 0 to {spec.depth - 1}; give one of "
                "them, or a fraction of the depth between 0 and 1, at "
                "model.objectives.NAME.init_args.layer"
            )
        self.block = None if block is None else int(block)
        self.norm = None if block is None else nn.LayerNorm(spec.dim, eps=1e-6)

    @property
    def layers(self) -> tuple[int, ...]:
        """For `Pass.layers`."""
        return () if self.block is None else (self.block,)

    def forward(self, tokens: Tokens) -> Tokens:
        if self.norm is None or self.block is None:
            return tokens
        x, r = self.norm(tokens.layers[self.block]), tokens.prefix.shape[1]
        return tokens._replace(prefix=x[:, :r], patch=x[:, r:])
