"""The files of stored features: parts that ranks write, a journal of each, a manifest at the end.

A pass over a split has a folder. Each rank appends parts (`.npy`, several features a part) and a
line of its journal for each (`Parts`); a line says up to which place of the sweep the rank has
everything. After a stop the next generation of ranks, however many, begins at the smallest of
these places, and rows beyond it are ignored. When all ranks are through, one writes
`manifest.json`; without it there is no result.
"""

import fcntl
import hashlib
import json
import os
import re
import zlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from contramask.probes.features import Feature
from contramask.probes.parts import Parts
from contramask.types import UserError

FORMAT = 1
MANIFEST, LOCK = "manifest.json", "lock"
ROWS, KEYS = "rows", "keys"  # arrays beside the features: (place, label) and the samples' names
_JOURNAL = re.compile(r"(\d+)-(\d+)-of-(\d+)\.jsonl")
_PIECE = 1 << 22  # bytes of a file that are read at once for its checksum


def identity(content: Mapping[str, Any]) -> str:
    """A short name for what features hang on; any difference gives another."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def slug(feature: Feature) -> str:
    """A feature in the name of a file."""
    return str(feature).replace("/", "-")


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    found = 0
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            found = zlib.crc32(piece, found)
    return found


@dataclass(frozen=True)
class Part:
    """Rows that one rank wrote at once, of which those with start <= place < stop count.

    Attributes:
        name: the first word of its files.
        files: file -> (bytes, CRC-32).
        start: the first place that counts.
        stop: behind the last one; None: all the rest.
    """

    name: str
    files: Mapping[str, Sequence[int]]
    start: int
    stop: int | None

    def counts(self, places: np.ndarray) -> np.ndarray:
        """Which of these places count, as a boolean mask."""
        return (places >= self.start) & (self.stop is None or places < self.stop)


class PassFolder:
    """One pass over one split for some features, on the disk.

    Args:
        folder: of the split, see `Shelf`.
        content: what the features hang on.
        features: what the pass extracts.
    """

    def __init__(self, folder: Path, content: Mapping[str, Any], features: Sequence[Feature]):
        self.content, self.features = dict(content), tuple(features)
        names = [str(f) for f in self.features]
        self.settings = identity({"format": FORMAT, "content": self.content, "features": names})
        self.path = folder / f"pass-{identity({'features': sorted(names)})[:12]}"

    @property
    def finished(self) -> bool:
        """Whether the manifest is there."""
        return (self.path / MANIFEST).is_file()

    def parts(self) -> tuple[list[Part], int | None]:
        """The parts that count, and the place where extraction goes on; None: all is there.

        Generations are read in turn. What a rank of one wrote beyond the place that all its ranks
        had reached was extracted again by the next.
        """
        found: list[Part] = []
        at: int | None = 0
        for ranks in self._generations().values():
            starts = {entries["begin"]["start"] for entries in ranks if "begin" in entries}
            if at is None or starts != {at} or not all("begin" in e for e in ranks):
                continue
            stop = self._reached(ranks)
            for entries in ranks:
                written = {k: v for k, v in entries.items() if k not in ("begin", "end")}
                found += [Part(k, v["files"], at, stop) for k, v in written.items()]
            at = stop
        return found, at

    def _reached(self, ranks: Sequence[Mapping[str, Any]]) -> int | None:
        """Up to where all ranks of a generation have everything; None: to the end."""
        reached = [
            None
            if "end" in entries
            else max([v["upto"] for k, v in entries.items() if k != "begin"] + [
                entries["begin"]["start"]
            ])
            for entries in ranks
        ]  # fmt: skip
        return min((r for r in reached if r is not None), default=None)

    def _generations(self) -> dict[int, list[dict[str, Any]]]:
        """Generation -> what each of its ranks wrote; a rank without a journal wrote nothing."""
        found: dict[int, dict[int, dict[str, Any]]] = {}
        sizes: dict[int, int] = {}
        names = os.listdir(self.path) if self.path.is_dir() else []
        for match in filter(None, map(_JOURNAL.fullmatch, sorted(names))):
            generation, rank, world = map(int, match.groups())
            found.setdefault(generation, {})[rank] = self._read(self.path / match.group())
            sizes[generation] = world
        return {g: [found[g].get(r, {}) for r in range(sizes[g])] for g in sorted(found)}

    def _read(self, path: Path) -> dict[str, Any]:
        """A journal as it is; `Parts` would write it anew while other ranks read."""
        whole, _, _ = path.read_text("utf-8").rpartition("\n")  # a kill may cut the last line
        first, *lines = [json.loads(line) for line in whole.splitlines()] or [None]
        belongs = first == {"settings": self.settings}
        return {line["name"]: line["value"] for line in lines} if belongs else {}

    @property
    def generation(self) -> int:
        """The number of the next generation."""
        return max(self._generations(), default=-1) + 1

    @contextmanager
    def locked(self, *, wanted: bool = True) -> Generator[bool]:
        """Whether this process alone may write here; always true where it does not want to.

        Raises:
            UserError: nobody can.
        """
        if not wanted:
            yield True
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / LOCK, "w", encoding="utf-8")  # noqa: SIM115  closed below
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror or error}); set --cache to a "
                "folder that can"
            ) from error
        with lock as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True  # released with the file, also when the process is killed

    def finish(self) -> None:
        """Write the manifest and remove what does not belong to it. One rank does.

        Raises:
            UserError: if ranks are missing, which wrote to a folder that this one does not see.
        """
        parts, at = self.parts()
        if at is not None:
            raise UserError(
                f"{self.path}: not all ranks have finished here; --cache must be a folder that all "
                "ranks see"
            )
        manifest = {
            "format": FORMAT,
            "content": self.content,
            "features": [str(f) for f in self.features],
            "parts": [vars(part) for part in parts],
        }
        text = json.dumps(manifest, indent=1) + "\n"
        write_whole(self.path / MANIFEST, lambda file: file.write(text.encode()))
        kept = {name for part in parts for name in part.files} | {MANIFEST, LOCK}
        for name in set(os.listdir(self.path)) - kept:
            if name.endswith((".npy", ".jsonl")):
                (self.path / name).unlink()


class PartWriter:
    """Appends the parts of one rank.

    Args:
        folder: the pass.
        generation, rank, world: of this process.
        start: the place at which its generation begins.
    """

    def __init__(self, folder: PassFolder, *, generation: int, rank: int, world: int, start: int):
        self.folder, self.name = folder, f"{generation:03d}-{rank}-of-{world}"
        self.journal = Parts(folder.path / f"{self.name}.jsonl", folder.settings)
        self.journal.add("begin", {"start": start})
        self.count = 0

    def add(self, arrays: Mapping[str, np.ndarray], upto: int) -> None:
        """One part: its arrays by their last names, and the place up to which all is there.

        Raises:
            UserError: if the disk is full.
        """
        name, files = f"{self.name}-{self.count:05d}", {}
        self.count += 1
        for last, array in arrays.items():
            path = self.folder.path / f"{name}.{last}.npy"
            write_whole(path, lambda file, a=array: np.save(file, a, allow_pickle=False))
            files[path.name] = (path.stat().st_size, checksum(path))
        self.journal.add(name, {"files": files, "upto": upto})

    def end(self) -> None:
        """This rank has seen the whole of its sweep."""
        self.journal.add("end", {})


def write_whole(path: Path, write: Any) -> None:
    """A file that appears under its name only when it is on the disk. Raises `UserError`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); make room, or set --cache to "
            "another folder"
        ) from error
