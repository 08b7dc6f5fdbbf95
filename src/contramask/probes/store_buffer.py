"""Features on their way to the disk, gathered into parts of a worthwhile size."""

import time
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from contramask.probes.features import Feature
from contramask.probes.store_files import KEYS, ROWS, PartWriter, slug
from contramask.types import Batch

# A part is written when it has so many bytes, or is so old: what a stop can cost.
BYTES, SECONDS = 1 << 28, 60.0


class Buffer:
    """Rows of one rank on their way to a part.

    Args:
        writer: of the parts.
        features: in the order in which `add` gets them.
        stride: places from a micro-batch of this rank to its next.
        first: the place of its first micro-batch.
        lanes: how many workers read in turn; None: places do not follow one another.
    """

    def __init__(
        self,
        writer: PartWriter,
        features: Sequence[Feature],
        *,
        stride: int,
        first: int,
        lanes: int | None,
    ):
        self.writer, self.features = writer, features
        self.stride, self.first, self.lanes = stride, first, lanes
        # The next micro-batch of each worker. One whose images are all bad never comes, and those
        # of the other workers overtake it: only what lies before all of these is surely in.
        self.following = [first + lane * stride for lane in range(lanes or 0)]
        self.ended = False
        self._empty()

    def add(self, batch: Batch, x: Sequence[Tensor], y: Tensor) -> None:
        """The labelled images of a batch."""
        position, labels = batch["position"], y.cpu().numpy()
        known = labels >= 0
        places = position + np.arange(len(labels))
        self.rows.append(np.stack([places, labels], 1)[known])
        self.keys += [k for k, good in zip(batch.get("keys", []), known, strict=True) if good]
        for feature, values in zip(self.features, x, strict=True):
            kept = values.float().cpu().numpy()[known]
            self.x[feature].append(kept)
            self.bytes += kept.nbytes
        if self.lanes is not None:
            lane = (position - self.first) // self.stride % self.lanes
            self.following[lane] = position + self.stride * self.lanes
        if self.bytes >= BYTES or time.monotonic() - self.since >= SECONDS:
            self._write()

    def end(self) -> None:
        """Nothing follows."""
        if not self.ended:
            self._write()
            self.writer.end()
            self.ended = True

    def _write(self) -> None:
        if self.keys:
            arrays = {
                ROWS: np.concatenate(self.rows),
                KEYS: np.array([k.encode() for k in self.keys]),
            }
            arrays |= {slug(f): np.concatenate(self.x[f]) for f in self.features}
            self.writer.add(arrays, min(self.following, default=0))
        self._empty()

    def _empty(self) -> None:
        self.rows: list[np.ndarray] = []
        self.keys: list[str] = []
        self.x: dict[Feature, list[np.ndarray]] = {f: [] for f in self.features}
        self.bytes, self.since = 0, time.monotonic()
