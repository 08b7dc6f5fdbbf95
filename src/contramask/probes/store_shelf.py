"""Stored features: extracted once, on disk, refused where they are not the ones that are wanted."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from contramask.probes.features import Feature
from contramask.probes.store import Bank, StoredFeatures, StoredRows
from contramask.probes.store_files import (
    FORMAT,
    KEYS,
    MANIFEST,
    ROWS,
    Part,
    PassFolder,
    checksum,
    identity,
    slug,
)
from contramask.types import UserError


class Shelf:
    """The stored features of one split: a folder whose name is a checksum of all they hang on.

    Args:
        folder: of all splits, backbones and data.
        split: `train` or `val`.
        content: what the features hang on, as JSON can hold it: backbone, transform, data, ...
    """

    def __init__(self, folder: Path, split: str, content: Mapping[str, Any]):
        self.content = json.loads(json.dumps({"split": split, **content}))
        self.path = folder / f"{split}-{identity(self.content)[:16]}"

    def stored(self) -> dict[Feature, dict[str, Any]]:
        """Feature -> manifest of the pass that extracted it.

        Raises:
            UserError: for a manifest of other content, or one that cannot be read.
        """
        found: dict[Feature, dict[str, Any]] = {}
        for path in sorted(self.path.glob(f"pass-*/{MANIFEST}")):
            manifest = self._read(path)
            for name in manifest["features"]:
                found.setdefault(Feature.parse(name), manifest)
        return found

    def missing(self, wanted: Sequence[Feature]) -> tuple[Feature, ...]:
        """Which of these are not stored yet, each once."""
        stored = self.stored()
        return tuple(f for f in dict.fromkeys(wanted) if f not in stored)

    def new_pass(self, features: Sequence[Feature]) -> PassFolder:
        """A pass that extracts these."""
        return PassFolder(self.path, self.content, features)

    def open(self, wanted: Sequence[Feature]) -> Bank:
        """The rows of these features, in the order of the sweep.

        Raises:
            UserError: a file is missing, damaged or not the one that was written.
        """
        stored, x, first = self.stored(), {}, None
        for feature in dict.fromkeys(wanted):
            manifest = stored[feature]
            parts = [Part(**part) for part in manifest["parts"]]
            table = _Table(Path(manifest["folder"]), parts)
            first = first or table
            if not first.equals(table):
                raise UserError(
                    f"{self.path}: its passes hold different images; remove this folder to have "
                    "the features extracted again"
                )
            x[feature] = table.rows(feature)
        assert first is not None, "no feature is wanted"
        y = torch.from_numpy(first.y)
        return Bank(StoredFeatures(x), y, first.keys, origin=self.path.name)

    def _read(self, path: Path) -> dict[str, Any]:
        again = f"remove {path.parent} to have the features extracted again"
        try:
            manifest = json.loads(path.read_text("utf-8"))
            if manifest["format"] != FORMAT:
                raise ValueError(f"format {manifest['format']}, wanted is {FORMAT}")
            content = manifest["content"]
            for part in manifest["parts"]:
                Part(**part)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is no manifest of stored features ({type(error).__name__}: {error}); "
                f"{again}"
            ) from error
        other = [k for k in {*content, *self.content} if content.get(k) != self.content.get(k)]
        if other:
            raise UserError(
                f"{path} holds features of another {' and '.join(sorted(other))}; they are not "
                f"used; {again}"
            )
        return manifest | {"folder": str(path.parent)}


class _Table:
    """Which rows the parts of a pass hold, in the order of their places."""

    def __init__(self, folder: Path, parts: Sequence[Part]):
        self.folder, self.parts = folder, parts
        tables = [self._load(part, ROWS) for part in parts]
        kept = [np.flatnonzero(p.counts(t[:, 0])) for p, t in zip(parts, tables, strict=True)]
        nothing = np.empty(0, np.int64)
        places = np.concatenate([nothing, *(t[k, 0] for t, k in zip(tables, kept, strict=True))])
        order = np.argsort(places, kind="stable")
        numbers = [np.full(len(k), i, np.int64) for i, k in enumerate(kept)]
        self.place = places[order]
        self.part = np.concatenate([nothing, *numbers])[order]
        self.row = np.concatenate([nothing, *kept])[order]
        labels = [t[k, 1] for t, k in zip(tables, kept, strict=True)]
        self.y = np.concatenate([nothing, *labels])[order]
        names = [self._load(p, KEYS)[k] for p, k in zip(parts, kept, strict=True)]
        self.keys = [k.decode() for k in np.concatenate([np.empty(0, "S1"), *names])[order]]

    def equals(self, other: "_Table") -> bool:
        return np.array_equal(self.place, other.place) and np.array_equal(self.y, other.y)

    def rows(self, feature: Feature) -> StoredRows:
        paths = [self._checked(part, slug(feature)) for part in self.parts]
        if not paths:
            return StoredRows([], self.part, self.row, 0)
        width = np.load(paths[0], mmap_mode="r", allow_pickle=False).shape[1]
        return StoredRows(paths, self.part, self.row, width)

    def _load(self, part: Part, last: str) -> np.ndarray:
        return np.load(self._checked(part, last), allow_pickle=False)

    def _checked(self, part: Part, last: str) -> Path:
        path = self.folder / f"{part.name}.{last}.npy"
        size, crc = part.files.get(path.name, (None, None))
        try:
            found = path.stat().st_size
            wrong = "" if found == size else f"has {found} bytes, its manifest says {size}"
            if not wrong and checksum(path) != crc:
                wrong = "has another checksum than its manifest says"
        except OSError as error:
            wrong = f"cannot be read ({error.strerror})"
        if wrong:
            raise UserError(
                f"{path} {wrong}; remove {path.parent} to have the features extracted again"
            )
        return path
