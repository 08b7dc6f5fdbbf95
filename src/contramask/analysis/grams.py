"""Gram matrices of layers over minibatches: all that CKA needs to know of a network.

Those of one network are compared with those of any other that saw the same minibatches, so each
network runs once however many it is compared with, and a frozen one never again.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
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

CACHED = 2**18  # numbers: 1 MB in float32

Pool = Literal["flat", "cls", "mean"]
Cleaning = Literal["raw", "standardised", "trimmed"]

# A spread of float32 numbers that is this little of their square is what rounding leaves.
ROUNDING = 1e-12


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
        if self.cleaning == "trimmed" and self.top >= spec.dim:
            raise UserError(
                f"cka: top is {self.top} of {spec.dim} channels; leave at least one; set top"
            )

        def shrink(tokens: Tensor, label: str) -> Float[Tensor, "G n n"]:
            weigh = None if self.cleaning == "raw" else self._weights
            return grams(self._pool(tokens, spec), self.batch, weigh)

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

    def _weights(self, variance: Float[Tensor, " C"]) -> Float[Tensor, " C"]:
        """What channels are multiplied with; centring is left to `grams`."""
        return (
            standardise(variance) if self.cleaning == "standardised" else trim(variance, self.top)
        )


class GramStack(NamedTuple):
    """Gram matrices of one network over minibatches."""

    name: str  # how they were taken, e.g. `flat/raw`
    labels: tuple[str, ...]  # of the layers
    table: Float[Tensor, "G L n n"]
    keys: tuple[int, ...]  # which images each minibatch holds, as one number


def grams(
    features: Float[Tensor, "B T C"],
    n: int,
    weigh: Callable[[Tensor], Float[Tensor, " C"]] | None = None,
) -> Float[Tensor, "G n n"]:
    """Inner products of the centred features of images in each full minibatch of n.

    Centred first, which changes no unbiased HSIC and keeps the sums from cancelling, so that
    float32 does: 1e-7 of the largest entry.

    Args:
        features: any precision; sums are in float32.
        n: images in a minibatch; what is left over is not looked at.
        weigh: gives what channels are multiplied with for their variance in a minibatch, (C,).
    """
    tokens = _at_once(features, n * features.shape[2])
    table = torch.zeros(len(features) // n, n, n, device=features.device)
    for gram, part in zip(table, features.split(n), strict=False):
        pieces = part.split(tokens, 1)
        means: Iterable[Tensor] = map(_mean, pieces)  # each when its piece is in the cache
        weight, size = None, torch.zeros((), device=features.device)
        if weigh is not None:
            means, variance = _spread(pieces)
            weight = weigh(variance)
        for piece, mean in zip(pieces, means, strict=True):
            x = piece.float() - mean
            size += mean.square().sum() * n
            x = (x if weight is None else x.mul_(weight)).flatten(1)
            gram.addmm_(x, x.mT)  # in place: autocast does not make it coarser
        if weight is None:  # what is constant has the rounding of its mean for a Gram matrix
            gram *= gram.trace() > ROUNDING * size
    return table


def _mean(piece: Float[Tensor, "n t C"]) -> Float[Tensor, "t C"]:
    return piece.mean(0, dtype=torch.float32)


def _spread(pieces: Sequence[Tensor]) -> tuple[list[Tensor], Float[Tensor, " C"]]:
    """Means over images, and the variance of each channel over images and tokens."""
    means, within = [], torch.zeros(pieces[0].shape[2], device=pieces[0].device)
    for piece in pieces:
        means.append(_mean(piece))
        within += (piece - means[-1]).square_().sum((0, 1))
    whole = torch.cat(means)
    _, between = channel_moments(whole[None])
    variance = within / (len(pieces[0]) * len(whole)) + between
    return means, variance * (variance > ROUNDING * whole.square().mean(0))


def channel_moments(
    tokens: Float[Tensor, "B T C"],
) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """Mean and variance (divided by the count) of each channel over images and tokens, in float32.

    Ten times as fast on a CPU as `torch.var` over leading axes.
    """
    rows = tokens.flatten(0, 1)
    mean = rows.mean(0, dtype=torch.float32)
    squares = torch.zeros_like(mean)
    for piece in rows.split(_at_once(rows, rows.shape[1])):
        squares += (piece - mean).square_().sum(0)
    return mean, squares / len(rows)


def standardise(variance: Float[Tensor, " C"]) -> Float[Tensor, " C"]:
    """Weights by which each channel has deviation 1; a constant channel is 0."""
    deviation = variance.sqrt()
    return 1 / deviation.where(deviation > 1e-6 * deviation.max().clamp(min=1e-30), torch.inf)


def trim(variance: Float[Tensor, " C"], top: int) -> Float[Tensor, " C"]:
    """Weights 0 for the `top` channels of the largest variance and 1 for the others."""
    if top >= len(variance):
        raise UserError(
            f"cka: top is {top} of {len(variance)} channels; leave at least one; set top"
        )
    return torch.ones_like(variance).index_fill(0, variance.topk(top).indices, 0.0)


def _at_once(x: Tensor, width: int) -> int:
    """How many slices of so many numbers to take at once: on a CPU those that stay in its cache."""
    return max(1, (CACHED if x.device.type == "cpu" else x.numel()) // width)
