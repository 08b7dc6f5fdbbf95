"""Parts of a training set for low-shot learning: a share of each class, or a list of names.

The samples of indexed shards are listed by their headers alone: key and label, not the image. What
is chosen becomes an index of its own, over the same shards, so that the stream over it is as exact
as any other: a function of (seed, position), with its epochs.
"""

import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64
from numpy import ndarray

from contramask.data import storage
from contramask.data.blocks import fetch
from contramask.data.faults import BadSample
from contramask.data.index_file import Index
from contramask.data.shards import open_raw
from contramask.data.storage import Span
from contramask.data.subset_names import by_name
from contramask.data.tarball import BLOCK, Shard, split_name
from contramask.errors import UserError
from contramask.types import fold

_NAMED = 5  # names or classes that an error lists


@dataclass(frozen=True)
class Subset:
    """Which part of the training samples is used; one of the three, or none for all.

    Attributes:
        fraction: of each class, rounded: 0.01 and 0.1 are the 1 % and the 10 % of low-shot
            protocols. Of one seed the smaller part lies in the larger.
        per_class: so many of each class.
        file: a text file with the key of a sample in each line, such as SimCLR's lists of ImageNet
            (arXiv:2002.05709); suffixes of images need not agree, and folders only where several
            samples share a name.
        seed: of the choice. What is chosen depends on it and on the keys, not on how samples lie
            in shards.
    """

    fraction: float | None = None
    per_class: int | None = None
    file: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        given = [k for k in ("fraction", "per_class", "file") if getattr(self, k) is not None]
        if len(given) > 1:
            raise UserError(f"subset: {' and '.join(given)} are both given; set one of them")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise UserError(
                f"subset: the fraction is {self.fraction}; it is above 0 and at most 1, "
                "0.01 is 1 %; set --subset"
            )
        if self.per_class is not None and self.per_class < 1:
            raise UserError(
                f"subset: {self.per_class} images of each class; set --per_class to 1 or more"
            )

    @property
    def whole(self) -> bool:
        """Whether all samples are used."""
        return self.fraction is None and self.per_class is None and self.file is None

    def about(self) -> str:
        """In words, for a protocol."""
        if self.file is not None:
            return f"samples named in {Path(self.file).name}"
        if self.per_class is not None:
            return f"{self.per_class} images of each class (seed {self.seed})"
        if self.fraction is not None:
            return f"{100 * self.fraction:g} % of each class (seed {self.seed})"
        return "all training images"


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Key and label of every sample of some shards, in their order; -1 where there is no label."""

    keys: list[str]
    labels: Int64[ndarray, " samples"]


def catalogue(index: Index) -> Catalogue:
    """Reads the headers and labels of all samples, some hundred bytes each.

    Raises `UserError` for a shard that cannot be read.
    """
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(_listed, index.shards))
    keys = [key for some, _ in found for key in some]
    return Catalogue(keys, np.concatenate([labels for _, labels in found]))


def choose(subset: Subset, known: Catalogue) -> Bool[ndarray, " samples"]:
    """Which samples belong to the subset.

    Raises:
        UserError: a class would be without an image, has too few, or names are unknown.
    """
    if subset.whole:
        return np.ones(len(known.keys), dtype=bool)
    if subset.file is not None:
        chosen = by_name(subset.file, known.keys)
    else:
        chosen = _stratified(subset, known)
    present = np.unique(known.labels[known.labels >= 0])
    absent = np.setdiff1d(present, known.labels[chosen])
    if len(absent):
        raise UserError(
            f"subset: {subset.about()} leave {_classes(absent)} without an image; take a larger "
            "part (--subset, --per_class), or complete the list (--subset_file)"
        )
    return chosen


def restricted(index: Index, chosen: Bool[ndarray, " samples"]) -> Index:
    """The index of these samples alone, over the same shards."""
    parts = np.split(chosen, np.cumsum(index.counts)[:-1])
    return Index(
        tuple(
            replace(shard, starts=shard.starts[mine], lengths=shard.lengths[mine])
            for shard, mine in zip(index.shards, parts, strict=True)
        )
    )


def missing(train: Int64[ndarray, "..."], val: Int64[ndarray, "..."]) -> str:
    """In words, the classes of validation that training lacks; empty if there is none."""
    lacking = np.setdiff1d(val[val >= 0], train)
    return _classes(lacking) if len(lacking) else ""


def _classes(labels: ndarray) -> str:
    more = f" and {len(labels) - _NAMED} more" if len(labels) > _NAMED else ""
    word = "class" if len(labels) == 1 else "classes"
    return f"{word} {', '.join(map(str, labels[:_NAMED]))}{more}"


def _stratified(subset: Subset, known: Catalogue) -> Bool[ndarray, " samples"]:
    chosen = np.zeros(len(known.keys), dtype=bool)
    for label in np.unique(known.labels[known.labels >= 0]):
        of_class = np.flatnonzero(known.labels == label)
        if subset.per_class is not None:
            count = subset.per_class
            if count > len(of_class):
                raise UserError(
                    f"subset: {count} images of each class are wanted, class {label} has "
                    f"{len(of_class)}; set --per_class to at most that"
                )
        else:
            assert subset.fraction is not None
            count = int(subset.fraction * len(of_class) + 0.5)
        # The first so many of one order: a smaller part lies in a larger one.
        order = sorted(of_class, key=lambda i: fold(subset.seed, "subset", known.keys[i]))
        chosen[order[:count]] = True
    return chosen


def _listed(shard: Shard) -> tuple[list[str], ndarray]:
    """Keys and labels of a shard: header by header, until each sample's label is found."""
    keys: list[str] = [""] * shard.count
    labels = np.full(shard.count, -1, dtype=np.int64)
    at, left = shard.starts.copy(), np.arange(shard.count)
    ends = shard.starts + shard.lengths
    while len(left):
        spans = [Span(int(at[i]), int(min(2 * BLOCK, ends[i] - at[i]))) for i in left]
        following = []
        for i, data in zip(left.tolist(), _read(shard.url, spans), strict=True):
            member = _member(data)
            if member is None:  # a long name, a link, damage: webdataset knows
                keys[i], labels[i] = _whole(shard, i, keys[i])
                continue
            key, suffix, size = member
            keys[i] = keys[i] or key
            if suffix == "cls":
                labels[i] = _label(data[BLOCK : BLOCK + size])
                continue
            at[i] += BLOCK + -(-size // BLOCK) * BLOCK
            if at[i] < ends[i]:
                following.append(i)
        left = np.array(following, dtype=np.int64)
    return keys, labels


def _read(url: str, spans: list[Span]) -> list[bytes]:
    try:
        return storage.read(url, spans)
    except OSError as error:
        raise UserError(f"{url} cannot be read ({error}); restore it") from error


def _member(data: bytes) -> tuple[str, str, int] | None:
    """Key, suffix and bytes of the member whose header this is, if it is an ordinary one."""
    try:
        info = tarfile.TarInfo.frombuf(data[:BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    named = split_name(info.name) if info.isreg() else None
    return None if named is None else (*named, info.size)


def _whole(shard: Shard, sample: int, key: str) -> tuple[str, int]:
    try:
        key, members = open_raw(fetch([(shard, sample)])[0])
    except BadSample:
        return key, -1
    return key, _label(members.get("cls", b""))


def _label(text: bytes) -> int:
    try:
        return max(int(text), -1)
    except ValueError:
        return -1
