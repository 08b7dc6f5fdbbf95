"""What is known of a checkpoint file: a sidecar `NAME.json` with step, size and SHA-256.

Two files cannot be renamed in one act. So the sidecar goes first and describes the file to come
*and* the one it replaces: whenever the process dies, the file on disk is described by it.
"""

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """A whole checkpoint: how many updates it has seen, its size in bytes, its SHA-256."""

    step: int
    bytes: int
    sha256: str


def beside(path: Path) -> Path:
    """Where this process writes what is to be renamed to `path`: in the same file system."""
    return path.with_name(f"{path.name}.tmp.{os.getpid()}")


def sidecar(path: Path) -> Path:
    """The file that describes a checkpoint."""
    return path.with_name(f"{path.name}.json")


def records(path: Path) -> list[Record]:
    """What the sidecar says, the newest first; empty without a readable one."""
    try:
        return [Record(**item) for item in json.loads(sidecar(path).read_text("utf-8"))]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        log.warning("%s is damaged (%s); looking into the checkpoint itself", sidecar(path), error)
        return []


def swap(part: Path, path: Path, record: Record) -> None:
    """Rename a finished, synced file to its name, which may be in use.

    Raises:
        OSError: the file system refuses; `path` is then as it was.
    """
    before = records(path)
    _describe(path, [record, *before])
    os.replace(part, path)
    sync(path.parent)
    if before:
        _describe(path, [record])


def _describe(path: Path, known: list[Record]) -> None:
    part = beside(sidecar(path))
    try:
        with open(part, "w", encoding="utf-8") as file:
            json.dump([asdict(record) for record in known], file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, sidecar(path))
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Put a file on the disk, or what a directory knows of its files."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        # Some network file systems cannot sync a directory; they order renames themselves.
        if not path.is_dir():
            raise
    finally:
        os.close(handle)
