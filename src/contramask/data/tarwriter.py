"""A writer of shards whose bytes are a function of the members alone.

POSIX ustar, without times and owners.

Nothing here imports torch, so that processes which only move bytes start fast.
"""

import hashlib
import os
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from contramask.data.tarball import BLOCK, SUFFIXES, Shard


class TarWriter:
    """Writes one shard beside its final name; `close` gives its entry for the index."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.part = self.path.with_name(self.path.name + ".part")
        self.file = open(self.part, "wb")  # noqa: SIM115  closed by close or abort
        self.hash = hashlib.sha256()
        self.bytes = self.count = self.labels = 0
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.suffixes: Counter[str] = Counter()

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """One sample: suffix -> bytes, written in the order given."""
        self.starts.append(self.bytes)
        for suffix, data in members.items():
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size = len(data)
            padding = bytes(-len(data) % BLOCK)
            self._write(info.tobuf(tarfile.USTAR_FORMAT) + data + padding)
            self.suffixes[suffix] += 1
        self.ends.append(self.bytes)
        self.count += 1
        self.labels = max(self.labels, int(members.get("cls", b"-1")) + 1)

    @staticmethod
    def cost(members: Mapping[str, bytes]) -> int:
        """Bytes a sample takes in a tar."""
        return sum(BLOCK + -(-len(data) // BLOCK) * BLOCK for data in members.values())

    def close(self) -> Shard:
        """Ends the archive and syncs it; the file keeps its `.part` name until it is renamed."""
        end = self.bytes + 2 * BLOCK
        self._write(bytes(2 * BLOCK + -end % tarfile.RECORDSIZE))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        starts = np.array(self.starts, dtype=np.int64)
        return Shard(
            url=str(self.path),
            bytes=self.bytes,
            sha256=self.hash.hexdigest(),
            starts=starts,
            lengths=np.array(self.ends, dtype=np.int64) - starts,
            suffixes={k: self.suffixes[k] for k in SUFFIXES if self.suffixes[k]},
            labels=self.labels,
        )

    def abort(self) -> None:
        """Leaves nothing behind."""
        self.file.close()
        self.part.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.hash.update(data)
        self.bytes += len(data)
