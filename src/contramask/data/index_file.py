"""The index of a set of shards, as an object and as a file.

`train-000000.tar`, `train-000001.tar`, ... share `train.index.json` in their folder: one JSON file
(11 bytes a sample) that is read whole at the start, from disk or over the network. The places of
the samples are base64 of little-endian uint32: for each sample the gap before it and its length,
in tar blocks of 512 bytes.
"""

import base64
import json
import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from contramask.data import storage
from contramask.data.tarball import BLOCK, Shard
from contramask.errors import UserError

VERSION = 1


@dataclass(frozen=True, eq=False)
class Index:
    """The shards of one source, in the order the source lists them."""

    shards: tuple[Shard, ...]

    @cached_property
    def counts(self) -> np.ndarray:
        """Samples of each shard, (shards,) int64."""
        return np.array([shard.count for shard in self.shards], dtype=np.int64)

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return int(self.counts.sum())

    @property
    def labels(self) -> int:
        """The highest label + 1; 0 where there are no labels."""
        return max((shard.labels for shard in self.shards), default=0)

    @property
    def mean_bytes(self) -> float:
        """Bytes of an average sample."""
        return sum(int(s.lengths.sum()) for s in self.shards) / max(1, self.samples)


def index_name(url: str) -> str:
    """Where the index of a shard is: `a/train-000012.tar` -> `a/train.index.json`."""
    folder, name = posixpath.split(url)
    stem = re.sub(r"[-_.]*\d*$", "", re.sub(r"\.tar$", "", name))
    return posixpath.join(folder, f"{stem}.index.json" if stem else "index.json")


def place(url: str) -> str:
    """One spelling for each shard, so that shards of equal names in two folders stay apart."""
    return os.path.abspath(url) if storage.is_local(url) else url


def read_index(name: str) -> dict[str, Shard] | None:
    """The entries of an index file by `place`; None if there is no such file."""
    try:
        data = storage.read_all(name)
    except FileNotFoundError:
        return None
    try:
        content = json.loads(data)
        if content["format"] != "contramask index" or content["version"] != VERSION:
            raise ValueError(f"format {content['format']!r}, version {content['version']!r}")
        shards = [_shard(entry, name) for entry in content["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{name} is not an index of version {VERSION} ({type(error).__name__}: {error}); "
            "make it again with `contramask pack index`"
        ) from None
    return {shard.url: shard for shard in shards}


def write_index(name: str, shards: Sequence[Shard]) -> None:
    """Writes an index file beside its final name, syncs and renames it."""
    entries = [_entry(shard, name) for shard in sorted(shards, key=lambda shard: shard.url)]
    content = {"format": "contramask index", "version": VERSION, "shards": entries}
    part = f"{name}.part"
    try:
        with open(part, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, name)
    except OSError as error:
        raise UserError(
            f"{name} cannot be written ({error.strerror}); write the index elsewhere with "
            "`contramask pack index SHARDS --out FILE` and name it in data.streaming.index"
        ) from error


def _entry(shard: Shard, name: str) -> dict[str, Any]:
    ends = shard.starts + shard.lengths
    gaps = shard.starts - np.concatenate([[0], ends[:-1]])
    places = np.stack([gaps, shard.lengths], axis=1) // BLOCK
    folder, base = posixpath.split(place(shard.url))
    beside = folder == posixpath.dirname(place(name))
    return {
        "name": base if beside else place(shard.url),
        "bytes": shard.bytes,
        "sha256": shard.sha256,
        "count": shard.count,
        "suffixes": shard.suffixes,
        "foreign": shard.foreign,
        "labels": shard.labels,
        "places": base64.b64encode(places.astype("<u4").tobytes()).decode("ascii"),
    }


def _beside(name: str, index: str) -> str:
    return name if "://" in name else posixpath.join(posixpath.dirname(place(index)), name)


def _shard(entry: dict[str, Any], name: str) -> Shard:
    places = np.frombuffer(base64.b64decode(entry["places"]), dtype="<u4").reshape(-1, 2)
    bounds = np.cumsum(places.astype(np.int64).reshape(-1)) * BLOCK
    starts, ends = bounds[0::2].copy(), bounds[1::2]
    if len(starts) != entry["count"]:
        raise ValueError(f"{entry['name']}: {len(starts)} places of {entry['count']} samples")
    return Shard(
        url=_beside(entry["name"], name),
        bytes=entry["bytes"],
        sha256=entry["sha256"],
        starts=starts,
        lengths=ends - starts,
        suffixes=entry["suffixes"],
        foreign=entry["foreign"],
        labels=entry["labels"],
    )
