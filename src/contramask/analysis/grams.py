"""Gram matrices of layers over minibatches: all that CKA needs to know of a network.

Those of one network are compared with those of any other that saw the same minibatches, so each
network runs once however many it is compared with, and a frozen one never again.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from contramask.analysis.analysis import Analysis, Seen, Tap
from contramask.analysis.reading import Reading
from contramask.types import Spec, UserError, fold

# The nine places in a block of Shekhar et al., 2023 (arXiv:2304.13089), in the order of the paper.
SUBLAYERS = (
    "norm1", "attn", "attn.qkv", "attn.proj", "norm2", "mlp", "mlp.fc1", "mlp.act", "mlp.fc2",
)  # fmt: skip
BLOCK = "block"  # the output of the block, which the paper leaves out

Pool = Literal["flat", "cls", "mean"]
Cleaning = Literal["raw", "standardised", "trimmed"]


class Grams(Analysis):
    """Centred Gram matrices of minibatches of `batch` images, in float32, for `cka`.

    Memory and disk: 4 n^2 bytes for a layer and minibatch, 14 MB for 108 layers and 1,024 images.

    Attributes:
        stacks: minibatch by minibatch, (layers, n, n), on the host.
        labels: of the layers, block by block.
        keys: which images each minibatch holds, as one number a minibatch.

    Args:
        pool: `flat`: all tokens and channels of an image side by side, the class token included (as
            the paper); `cls`; `mean`: of the patches.
        cleaning: `raw`; `standardised`: each channel to mean 0 and deviation 1 over the images and
            tokens of the minibatch; `trimmed`: without the `top` channels of the largest variance
            in the minibatch (arXiv:2401.00463 finds a few hundred that carry little).
        top: channels that `trimmed` leaves out.
        sublayers: of every block; `block` is its output.
        batch: n, images in a minibatch; the paper's 32.
        images: the most images that are looked at.
    """

    def __init__(
        self,
        *,
        pool: Pool = "flat",
        cleaning: Cleaning = "raw",
        top: int = 10,
        sublayers: tuple[str, ...] = (*SUBLAYERS, BLOCK),
        batch: int = 32,
        images: int | None = None,
    ):
        super().__init__()
        if batch < 4:
            raise UserError(f"cka: batch is {batch}; unbiased HSIC needs at least 4; set batch")
        self.pool, self.cleaning, self.top = pool, cleaning, top
        self.sublayers, self.batch, self.images = sublayers, batch, images
        self.stacks: list[Tensor] = []
        self.labels: tuple[str, ...] = ()
        self.keys: list[int] = []

    @property
    def name(self) -> str:
        """`flat/raw`; what was trimmed is told too."""
        cleaning = f"without_top_{self.top}" if self.cleaning == "trimmed" else self.cleaning
        return f"{self.pool}/{cleaning}"

    def taps(self, spec: Spec) -> Mapping[str, Tap]:
        def shrink(tokens: Tensor, label: str) -> Float[Tensor, "G n n"]:
            return grams(self._clean(self._pool(tokens, spec)), self.batch)

        names = {s: "blocks.*" if s == BLOCK else f"blocks.*.{s}" for s in self.sublayers}
        return {s: Tap("output", pattern, shrink) for s, pattern in names.items()}

    def update(self, seen: Seen) -> None:
        taps = [list(seen.found[s].items()) for s in self.sublayers]
        if len({len(t) for t in taps}) > 1:
            raise UserError(
                f"cka: the sub-layers {', '.join(self.sublayers)} are not in every block; leave "
                "out those that some blocks lack"
            )
        ordered = [layer for block in zip(*taps, strict=True) for layer in block]
        self.labels = tuple(name for name, _ in ordered)
        table = torch.stack([gram for _, gram in ordered], 1)  # (G, L, n, n)
        self.stacks += list(table.cpu())
        groups = range(0, len(table) * self.batch, self.batch)
        self.keys += [fold(*seen.keys[i : i + self.batch]) for i in groups]

    def reset(self) -> None:
        super().reset()
        self.stacks, self.labels, self.keys = [], (), []

    def readings(self) -> list[Reading]:
        """Nothing: CKA is of two, see `cka.compare`."""
        return []

    def stack(self) -> "GramStack":
        """What was gathered on this rank. Raises `UserError` if no minibatch was full."""
        if not self.stacks:
            raise UserError(
                f"cka: there are fewer images than a minibatch of {self.batch} in every batch; "
                "give more images, a larger data.batch_size, or a smaller minibatch"
            )
        return GramStack(self.name, self.labels, torch.stack(self.stacks), tuple(self.keys))

    def _pool(self, tokens: Tensor, spec: Spec) -> Float[Tensor, "B T C"]:
        prefix = tokens.shape[1] - spec.patches
        if self.pool == "cls":
            if not prefix:
                raise UserError("cka: this backbone has no class token; set pool to mean or flat")
            return tokens[:, :1]
        if self.pool == "mean":
            return tokens[:, prefix:].mean(1, keepdim=True)
        return tokens

    def _clean(self, tokens: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        if self.cleaning == "raw":
            return tokens
        parts = tokens.float().split(self.batch)
        if self.cleaning == "standardised":
            return torch.cat([standardise(part) for part in parts])
        return torch.cat([trim(part, self.top) for part in parts])


class GramStack(NamedTuple):
    """Gram matrices of one network over minibatches."""

    name: str  # how they were taken, e.g. `flat/raw`
    labels: tuple[str, ...]  # of the layers
    table: Float[Tensor, "G L n n"]
    keys: tuple[int, ...]  # which images each minibatch holds, as one number


def grams(features: Float[Tensor, "B T C"], n: int) -> Float[Tensor, "G n n"]:
    """Inner products of the centred features of images in each full minibatch of n.

    Centred first, which changes no unbiased HSIC and keeps the sums from cancelling, so that
    float32 does: 1e-7 of the largest entry.
    """
    x = features[: len(features) // n * n].float().flatten(1).unflatten(0, (-1, n))  # (G, n, TC)
    x = x - x.mean(1, keepdim=True)
    return x @ x.mT


def standardise(tokens: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
    """Each channel to mean 0 and deviation 1; a constant channel is 0."""
    deviation, mean = torch.std_mean(tokens, (0, 1), correction=0)
    safe = deviation.where(deviation > 1e-6 * deviation.max().clamp(min=1e-30), torch.inf)
    return (tokens - mean) / safe


def trim(tokens: Float[Tensor, "B T C"], top: int) -> Float[Tensor, "B T C"]:
    """Without the `top` channels of the largest variance; they are set to 0."""
    variance = tokens.var((0, 1), correction=0)
    if top >= len(variance):
        raise UserError(
            f"cka: top is {top} of {len(variance)} channels; leave at least one; set top"
        )
    gone = variance.topk(top).indices
    return tokens.index_fill(2, gone, 0.0)
