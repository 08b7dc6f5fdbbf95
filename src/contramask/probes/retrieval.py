"""What the probes of retrieval share: images read once, known by their pixels on every rank."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from contramask.functional.cleaning import Cleaning, fit
from contramask.functional.retrieval import Metric, ready
from contramask.models.backbone import Backbone
from contramask.probes.extraction import gather_rows
from contramask.probes.features import CLEAN, Feature, features, patch_features
from contramask.types import Batch, UserError, fold

# Counts and rates by name.
Values = dict[str, int | float]

# Images forwarded at once that were warped or distorted here.
CHUNK = 64


@dataclass(frozen=True)
class Reader:
    """Features of images that are not normalised.

    Attributes:
        backbone: in eval mode.
        feature: which; patches are read at its `source` and `norm`.
        mean: subtracted from the channels, which are in [0, 1].
        std: what the channels are divided by.
        precision: the context of every forward, autocast or nothing. What is ranked together must
            be read alike, whether a loader or a probe asks for it.
    """

    backbone: Backbone
    feature: Feature
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return next(self.backbone.parameters()).device

    def levels(self, images: Float[Tensor, "B 3 H W"]) -> UInt8[Tensor, "B 3 H W"]:
        """The 8-bit images that were normalised; exact for what the data module yields."""
        mean, std = (images.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (255 * (images * std + mean)).round().clamp(0, 255).to(torch.uint8)

    def images(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
        """One feature of each image in [0, 1]."""
        f, x = self.feature, self._normal(images)
        with self.precision():
            return finite(features(self.backbone, x, source=f.source, pool=f.pool, norm=f.norm))

    def patches(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B P D"]:
        """One feature of each patch of images in [0, 1]."""
        f, x = self.feature, self._normal(images)
        with self.precision():
            return finite(patch_features(self.backbone, x, source=f.source, norm=f.norm))

    def _normal(self, images: Tensor) -> Tensor:
        images = images.to(self.device)
        mean, std = (images.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (images - mean) / std


def finite(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The same. Raises `UserError` where something is not finite: it could not be ranked."""
    if not x.isfinite().all():
        raise UserError(
            "retrieval: features are not finite; look for what broke the backbone, or choose "
            "another --source"
        )
    return x


@torch.no_grad()
def fingerprints(levels: UInt8[Tensor, "B 3 H W"]) -> Int[Tensor, " B"]:
    """A 64-bit number of each image's pixels, the same wherever the image turns up.

    A sum of pixels times fixed random numbers, modulo 2^64: integers, so alike on every device.
    """
    rows = levels.flatten(1)
    return (rows.long() * _factors(rows.shape[1], rows.device)).sum(1)


@lru_cache(maxsize=4)
def _factors(number: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(fold("fingerprint", number))
    return torch.randint(-(2**62), 2**62, (number,), generator=generator).to(device)


class Stock:
    """The images of one loader on this rank.

    Args:
        reader: of features.
        keep: keep the pixels, 3 H W bytes an image, on the CPU.
        read: keep a feature of each image, 4 F bytes, on the device.
    """

    def __init__(self, reader: Reader, *, keep: bool = False, read: bool = False):
        self.reader, self.keep, self.read = reader, keep, read
        self.keys: list[str] = []
        width = reader.feature.width(reader.backbone.spec) if read else 0
        device = reader.device
        self._levels: list[Tensor] = []
        self._x = [torch.empty((0, width), device=device)]
        self._y = [torch.empty(0, dtype=torch.long, device=device)]
        self._ids = [torch.empty(0, dtype=torch.long, device=device)]

    def add(self, batch: Batch) -> None:
        """One clean batch. Raises `UserError` where it has no view `clean`."""
        if CLEAN not in batch["views"]:
            raise UserError(
                f"probe: the batch has the views {sorted(batch['views'])}; probes read one named "
                f"{CLEAN!r}; give the clean loaders of the data module"
            )
        images = batch["views"][CLEAN][0].to(self.reader.device)
        levels = self.reader.levels(images)
        place = [f"image {batch['position'] + i}" for i in range(len(images))]
        self.keys += batch.get("keys") or place
        self._y.append(batch["label"].to(images.device))
        self._ids.append(fingerprints(levels))
        if self.read:
            self._x.append(self.reader.images(levels.float() / 255))
        if self.keep:
            self._levels.append(levels.cpu())

    @property
    def labels(self) -> Int[Tensor, " B"]:
        """Of this rank's images; -1: none."""
        return torch.cat(self._y)

    @property
    def ids(self) -> Int[Tensor, " B"]:
        """The fingerprints of this rank's images."""
        return torch.cat(self._ids)

    @property
    def x(self) -> Float[Tensor, "B F"]:
        """The features of this rank's images, held once."""
        if len(self._x) > 1:
            self._x = [torch.cat(self._x)]
        return self._x[0]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the pixels that are kept; (0, 0): this rank has none."""
        if not self._levels:
            return (0, 0)
        height, width = self._levels[0].shape[2:]
        return (height, width)

    def chunks(self) -> Iterator[tuple[UInt8[Tensor, "B 3 H W"], list[str], slice]]:
        """This rank's kept images, their keys, and which of its rows they are."""
        at = 0
        for batch in self._levels:
            for part in batch.split(CHUNK):
                here = slice(at, at + len(part))
                yield part, self.keys[here], here
                at += len(part)


def everywhere(
    ids: Int[Tensor, " B"], *rows: Tensor, via: torch.device
) -> tuple[Int[Tensor, " M"], list[Tensor]]:
    """Rows of all ranks, one of each image, in the order of their fingerprints.

    So what is computed from them does not hang on how images were spread over ranks.

    Args:
        ids: fingerprints of this rank's images; equal pixels are one image.
        rows: tensors with one row for each.
        via: the device the ranks speak through.
    """
    every = gather_rows(ids, via=via)
    found, inverse = every.unique(return_inverse=True)
    # The first row of each image, by the lowest place that leads to it.
    places = torch.arange(len(every), device=every.device)
    first = torch.full_like(found, len(every)).scatter_reduce(0, inverse, places, "amin")
    return found, [gather_rows(x, via=via)[first] for x in rows]


class Space:
    """Where similarities are taken: features cleaned by the statistics of the bank.

    Args:
        bank: rows of all ranks.
        cleaning: fitted on them.
        metric: what is near.

    Raises:
        UserError: see `fit`.
    """

    def __init__(self, bank: Float[Tensor, "N F"], cleaning: Cleaning, metric: Metric):
        self.cleaner = fit(cleaning, bank)
        self.metric: Metric = metric
        self.bank = self(bank)

    def __call__(self, rows: Float[Tensor, "N F"]) -> Float[Tensor, "N G"]:
        """Rows cleaned, as `similarities` wants them."""
        return ready(self.cleaner(rows), self.metric)


def rounded(sums: Sequence[float], count: int | float) -> list[float]:
    """Means over so many, as results are written."""
    return [round(float(s) / count, 6) for s in sums]
