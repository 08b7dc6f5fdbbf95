"""Labelled features of a split as a bank, in memory or read from part files by their numbers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from contramask.probes.features import Feature
from contramask.types import UserError


@dataclass(frozen=True, eq=False)
class Bank:
    """Labelled features of one split, all of the same N images in the same order.

    Attributes:
        x: feature -> (N, F) float32.
        y: labels.
        keys: the samples' names.
        origin: a checksum of all that the features hang on, the name of their folder; empty where
            they were not stored.
    """

    x: Mapping[Feature, Tensor]
    y: Int[Tensor, " N"]
    keys: list[str]
    origin: str = ""

    def __len__(self) -> int:
        return len(self.y)

    def check(self, split: str, classes: int) -> None:
        """Raise `UserError` unless there are rows and every label is 0 .. classes - 1."""
        if not len(self):
            raise UserError(
                f"probe: no image of {split} has a label; a probe needs `cls` in its shards; "
                f"set data.{split} to labelled shards"
            )
        wrong = ((self.y < 0) | (self.y >= classes)).nonzero()[:, 0].tolist()
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise UserError(
                f"probe: the label of {self.keys[wrong[0]]} in {split} is "
                f"{int(self.y[wrong[0]])}{more}; allowed are 0 to {classes - 1}; correct the "
                "shards, or set data.images.classes"
            )


class StoredRows:
    """The rows (N, F) of one feature, spread over part files, read by their numbers.

    `rows[torch.tensor([3, 1])]` reads two rows and no more.

    Args:
        files: of the parts, float32 (n, F) each.
        part: for each row of the bank its part.
        row: and its row there.
        width: F.
    """

    def __init__(
        self,
        files: Sequence[Path],
        part: Int[np.ndarray, " N"],
        row: Int[np.ndarray, " N"],
        width: int,
    ):
        self.files, self.part, self.row = list(files), part, row
        self.shape = (len(row), width)
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Int[Tensor, " B"]) -> Float[Tensor, "B F"]:
        asked = rows.cpu().numpy()
        parts, inside = self.part[asked], self.row[asked]
        found = np.empty((len(asked), self.shape[1]), np.float32)
        for number in np.unique(parts):
            here = parts == number
            found[here] = self._map(int(number))[inside[here]]
        return torch.from_numpy(found)

    def join(self) -> Float[Tensor, "N F"]:
        """All rows. Memory-mapped where one part holds them as they are, else in memory."""
        n = len(self)
        if len(self.files) == 1 and np.array_equal(self.row, np.arange(n)):
            whole = self._map(0)
            if len(whole) == n:
                return torch.from_numpy(whole)
        return self[torch.arange(n)]

    def _map(self, number: int) -> np.ndarray:
        if number not in self._maps:
            # "c": nothing is ever written back, and torch takes it for an ordinary array.
            self._maps[number] = np.load(self.files[number], mmap_mode="c", allow_pickle=False)
        return self._maps[number]


class StoredFeatures(Mapping[Feature, Tensor]):
    """Features of a bank, joined when they are first asked for and kept; `rows` joins nothing."""

    def __init__(self, rows: Mapping[Feature, StoredRows]):
        self._rows = dict(rows)
        self._joined: dict[Feature, Tensor] = {}

    def rows(self, feature: Feature) -> StoredRows:
        """The rows on the disk."""
        return self._rows[feature]

    def __getitem__(self, feature: Feature) -> Tensor:
        if feature not in self._joined:
            self._joined[feature] = self._rows[feature].join()
        return self._joined[feature]

    def __iter__(self) -> Iterator[Feature]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
