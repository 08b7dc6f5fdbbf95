"""What is done to features before neighbours are looked for: nothing, z-scores, whitening, removal.

Vanyan et al., 2024 (arXiv:2401.00463) delete the channels of an MAE that vary most and find its
nearest neighbours mended; z-scoring does the same there. Statistics are those of the train rows.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from contramask.functional.channels import top_channels
from contramask.functional.whitening import times, whitening
from contramask.types import UserError

Kind = Literal["raw", "zscore", "pca", "top"]
Reduce = Callable[[Tensor], Tensor]

# Numbers in float64 that are held at once: 64 MiB.
ELEMENTS = 2**23

_WORD = re.compile(r"(raw|zscore|pca)|(pca|top)([1-9]\d*)")


@dataclass(frozen=True)
class Cleaning:
    """One way of cleaning, by its word.

    Attributes:
        kind: `raw`, nothing; `zscore`, every channel to mean 0 and variance 1; `pca`, PCA-whitened:
            turned to principal directions, each with mean 0 and variance 1; `top`, the channels of
            highest variance removed, the others as they are.
        number: components that `pca` keeps, those of most variance (None: all); channels that `top`
            removes.
    """

    kind: Kind
    number: int | None = None

    @classmethod
    def parse(cls, word: str) -> "Cleaning":
        """`raw`, `zscore`, `pca`, `pca64` or `top20`. Raises `UserError` for another word."""
        found = _WORD.fullmatch(word)
        if found is None:
            raise UserError(
                f"cleaning is {word!r}; allowed are raw, zscore, pca, pca64 (so many components) "
                "and top20 (so many channels of highest variance removed); set cleanings"
            )
        plain, kind, number = found.groups()
        return cls(plain or kind, int(number) if number else None)  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        return f"{self.kind}{self.number or ''}"

    def about(self) -> str:
        """In words, for a protocol."""
        kept = "" if self.number is None else f", {self.number} components kept"
        return {
            "raw": "features as they are",
            "zscore": "channels z-scored by the statistics of train",
            "pca": f"PCA-whitened by the statistics of train{kept}",
            "top": f"the {self.number} channels of highest variance on train removed",
        }[self.kind]

    def check(self, width: int) -> None:
        """Raise `UserError` where features have too few channels, of which `top` leaves one."""
        most = width - (self.kind == "top")
        if self.number is not None and self.number > most:
            what = "removes channels" if self.kind == "top" else "keeps components"
            raise UserError(
                f"cleaning {self} {what}; features of width {width} allow 1..{most}; set cleanings"
            )


@dataclass(frozen=True)
class Cleaner:
    """A cleaning that has seen the train rows: maps rows (N, F) to cleaned rows (N, G).

    Attributes:
        cleaning: what it is.
        variance: of every channel on train, divided by the number of rows.
        mean: of every channel on train; subtracted by `zscore` and `pca`.
        scale: what channels are multiplied by; None: they keep their scale.
        basis: the whitening matrix; None where there is none.
        kept: channels that remain, ascending; None: all.
    """

    cleaning: Cleaning
    variance: Float[Tensor, " F"]
    mean: Float[Tensor, " F"]
    scale: Float[Tensor, " F"] | None = None
    basis: Float[Tensor, "F G"] | None = None
    kept: Int[Tensor, " G"] | None = None

    @property
    def centre(self) -> Float[Tensor, " G"]:
        """Where the train rows have their mean once they are cleaned."""
        if self.scale is not None or self.basis is not None:
            return self.mean.new_zeros(self.width)
        return self.mean if self.kept is None else self.mean[self.kept]

    @property
    def width(self) -> int:
        """G, the length of a cleaned row."""
        if self.basis is not None:
            return self.basis.shape[1]
        return len(self.variance if self.kept is None else self.kept)

    @torch.no_grad()
    def __call__(self, rows: Float[Tensor, "N F"]) -> Float[Tensor, "N G"]:
        """Cleaned rows, float32, on the device of the statistics; beside them some 64 MiB."""
        rows = rows.to(self.variance.device)
        if self.cleaning.kind == "raw":
            return rows.float()  # no copy of float32
        cleaned = rows.new_empty((len(rows), self.width), dtype=torch.float32)
        for part, out in zip(_parts(rows), _parts(cleaned, rows.shape[1]), strict=True):
            x = part.float()
            if self.kept is not None:
                torch.index_select(x, 1, self.kept, out=out)
            elif self.basis is not None:
                times(x - self.mean, self.basis, out)
            elif self.scale is not None:
                torch.mul(x - self.mean, self.scale, out=out)
        return cleaned


def _same(x: Tensor) -> Tensor:
    return x


@torch.no_grad()
def fit(
    cleaning: Cleaning,
    rows: Float[Tensor, "N F"],
    *,
    total: Reduce = _same,
    device: torch.device | None = None,
) -> Cleaner:
    """Take the statistics of train that a cleaning needs.

    Sums are of float64 and of two passes, first the mean, then deviations from it; statistics are
    rounded to float32. Beside them 64 MiB are held, and for `pca` a few matrices of F x F.

    What does not vary is not blown up. A channel of which the standard deviation is at most the
    rounding of float32 at its root mean square is constant: z-scored it is 0. Whitening drops
    directions of which the standard deviation is at most sqrt(F) such roundings at the largest root
    mean square of a channel; `width` tells how many are left.

    Args:
        cleaning: which.
        rows: of train; with several ranks those of this rank, also none.
        total: sums a float64 tensor over ranks (`contramask.distributed.total`), which all call.
        device: where the sums are made and the cleaner works; None: where the rows are.

    Raises:
        UserError: for no rows at all, rows that are not finite or, to be whitened, all alike, or a
            number beyond the width.
    """
    width = rows.shape[1]
    cleaning.check(width)
    sums = torch.zeros((2, width), dtype=torch.float64, device=device or rows.device)
    for part in _parts(rows):
        x = part.to(sums)
        sums[0] += x.sum(0)
        sums[1] += float(len(x))
    sums = total(sums)
    _check(cleaning, sums)
    mean = sums[0] / sums[1]
    whitens = cleaning.kind == "pca"
    scatter = mean.new_zeros((width, width) if whitens else width)
    for part in _parts(rows):
        x = part.to(mean) - mean
        scatter += x.mT @ x if whitens else x.square().sum(0)
    spread = total(scatter) / sums[1, 0]
    variance = (spread.diagonal() if whitens else spread).clone()
    return _cleaner(cleaning, mean, variance, spread)


def _cleaner(cleaning: Cleaning, mean: Tensor, variance: Tensor, spread: Tensor) -> Cleaner:
    step = torch.finfo(torch.float32).eps
    size = (variance + mean.square()).sqrt()  # the root mean square of every channel
    found: dict[str, Tensor] = {}
    match cleaning.kind:
        case "zscore":
            varies = variance.sqrt() > step * size
            scale = torch.where(varies, variance.rsqrt(), 0.0)
            found = {"scale": scale.float()}
        case "pca":
            least = len(mean) ** 0.5 * step * size.max()
            basis = whitening(spread, least, cleaning.number)
            found = {"basis": basis.float()}
        case "top":
            assert cleaning.number is not None
            kept = torch.ones_like(mean, dtype=torch.bool)
            kept[top_channels(variance, cleaning.number)] = False
            found = {"kept": kept.nonzero()[:, 0]}
    return Cleaner(cleaning, variance.float(), mean.float(), **found)


def _check(cleaning: Cleaning, sums: Float[Tensor, "2 F"]) -> None:
    if sums[1].eq(0).all():
        raise UserError(
            f"cleaning {cleaning}: train has no row; give labelled images in data.train"
        )
    if not sums.isfinite().all():
        raise UserError(
            f"cleaning {cleaning}: {int((~sums[0].isfinite()).sum())} of {sums.shape[1]} channels "
            "of train are not finite; look for what broke the backbone, or choose another source"
        )


def _parts(rows: Tensor, width: int | None = None) -> Iterator[Tensor]:
    """Slices of rows that hold `ELEMENTS` numbers at this width; by default the rows' own."""
    count = max(1, ELEMENTS // max(1, width or rows.shape[1]))
    return iter(rows.split(count)) if len(rows) else iter(())
