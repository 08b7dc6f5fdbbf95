"""Checkpoints on disk: whole or absent, known by their checksum when read, never code.

Written beside the final name, synced, renamed, and the directory synced: rename(2) is atomic only
within a file system, so nothing goes through $TMPDIR. Every checkpoint has a sidecar with its
checksum (`contramask.checkpoints.sidecar`).
"""

import hashlib
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, cast

import torch
from pytorch_lightning.plugins.io import CheckpointIO

from contramask.checkpoints.sidecar import Record, beside, records, sidecar, swap
from contramask.checkpoints.sink import Sink
from contramask.types import UserError

log = logging.getLogger(__name__)

MiB = 1 << 20
MapLocation = torch.device | str | dict[str, str] | Callable[..., Any] | None


class CheckpointError(UserError):
    """A checkpoint that could not be written, or must not be loaded."""


class CorruptCheckpoint(CheckpointError):
    """A checkpoint whose bytes are not those that were written."""


def write(checkpoint: dict[str, Any], path: Path) -> Record:
    """Save at `path`, in place of what may be there, without a copy of the whole in memory.

    Raises:
        CheckpointError: the disk is full, or another error of the file system; files that were
            there before are untouched and nothing new is left behind.
    """
    part = beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            sink = Sink(file)
            torch.save(checkpoint, cast("IO[bytes]", sink))
            record = Record(checkpoint["global_step"], sink.bytes, sink.finish())
        swap(part, path, record)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return record


def place(source: Path, target: Path) -> None:
    """Give a checkpoint a second name: a hard link, or a copy where links are not to be had."""
    part = beside(target)
    try:
        link_or_copy(source, part)
        swap(part, target, (records(source) or [verify(source)])[0])
    except OSError as error:
        raise _not_written(target, error) from error
    finally:
        # Still there also when both names were one file already: rename(2) then does nothing.
        with suppress(OSError):
            part.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file, in place of what `target` may be; or a copy on the disk."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        with open(source, "rb") as old, open(target, "wb") as new:
            shutil.copyfileobj(old, new, 16 * MiB)
            new.flush()
            os.fsync(new.fileno())


def remove(path: Path) -> None:
    """Delete a checkpoint, then its sidecar."""
    path.unlink(missing_ok=True)
    sidecar(path).unlink(missing_ok=True)


def sweep(directory: Path) -> None:
    """Delete what an interrupted save left. For the owner of a run, before it saves anything."""
    for part in sorted(directory.glob("*.tmp.*")):
        part.unlink(missing_ok=True)
        log.info("removed %s, left by a save that was interrupted", part.name)


def verify(path: Path) -> Record:
    """What is known of a checkpoint, after reading all its bytes.

    A file without a sidecar, say one that was copied by hand, is held against the checksums of
    its zip members instead, and opened for its step.

    Raises:
        CorruptCheckpoint: these are not the bytes that were written.
        CheckpointError: without a sidecar, and holding more than tensors and plain values.
    """
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error}") from error
    known = records(path)
    if not known:
        try:
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
        except (OSError, zipfile.BadZipFile) as error:
            raise CorruptCheckpoint(f"{path} is not a checkpoint: {error}") from error
        if bad:
            raise CorruptCheckpoint(f"{path} is damaged: the checksum of its member {bad} is wrong")
        return Record(_step_of(_open(path, "cpu"), path), *found)
    for record in known:
        if found == (record.bytes, record.sha256):
            return record
    raise CorruptCheckpoint(
        f"{path} is damaged: {found[0]} bytes with SHA-256 {found[1][:12]}..., but "
        f"{known[0].bytes} bytes with {known[0].sha256[:12]}... were written"
    )


def load(path: str | Path, map_location: MapLocation = "cpu") -> dict[str, Any]:
    """A verified checkpoint of tensors and plain values; anything else is refused.

    Raises:
        CheckpointError: a URL, a missing or damaged file, or one that holds other objects.
    """
    if "://" in str(path):
        raise CheckpointError(
            f"checkpoint {path}: only local files are loaded, so that nobody else can change what "
            "is run; download it, compare its checksum, and give the local path"
        )
    if not Path(path).is_file():
        raise CheckpointError(f"checkpoint {path}: there is no such file; give one of a run's")
    verify(Path(path))
    return _open(Path(path), map_location)


def newest(directory: Path) -> Path | None:
    """The good checkpoint of the most updates, whatever the files' times; None if there is none.

    Damaged files are passed over and named in the log.
    """
    best: tuple[int, Path] | None = None
    # Step files first: among equal steps the plainest name wins.
    files = sorted(directory.glob("*.ckpt"), key=lambda p: (not p.name.startswith("step-"), p.name))
    for path in sorted(files, key=_latest_step, reverse=True):
        if best is not None and _latest_step(path) <= best[0]:
            break
        try:
            record = verify(path)
        except CheckpointError as error:
            log.warning("passed over a checkpoint: %s", error)
            continue
        if best is None or record.step > best[0]:
            best = record.step, path
    return best[1] if best else None


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's door to the functions of this file."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None
    ) -> None:
        """See `write`."""
        assert storage_options is None, "local files have no storage options"
        write(checkpoint, Path(path))

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: MapLocation = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """See `load`."""
        if weights_only is False:
            raise CheckpointError(
                f"checkpoint {path}: weights_only=False would run code from the file and is "
                "refused; leave the argument out"
            )
        return load(path, map_location or "cpu")

    def remove_checkpoint(self, path: str | Path) -> None:
        """See `remove`."""
        remove(Path(path))


def _latest_step(path: Path) -> int:
    """The step a file can have at most, without reading it."""
    known = records(path)
    if known:
        return max(record.step for record in known)
    named = re.search(r"step-(\d+)", path.name)
    return int(named[1]) if named else 1 << 62  # unknown: look inside


def _open(path: Path, map_location: MapLocation) -> dict[str, Any]:
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} holds more than tensors and plain values, so loading it could run "
            f"code; it was refused and nothing was run ({str(error).splitlines()[0]})"
        ) from error
    except RuntimeError as error:
        raise CorruptCheckpoint(f"{path} cannot be opened as a checkpoint: {error}") from error


def _step_of(checkpoint: object, path: Path) -> int:
    match checkpoint:
        case {"global_step": int(step)}:
            return step
    raise CorruptCheckpoint(f"{path} is not a checkpoint of training: it holds no global_step")


def _not_written(path: Path, error: OSError) -> CheckpointError:
    folder = path.parent if path.parent.is_dir() else Path(path.anchor or ".")
    good = newest(folder)
    return CheckpointError(
        f"checkpoint {path} could not be written: {error.strerror or error} "
        f"({shutil.disk_usage(folder).free // MiB} MiB free there); "
        f"{f'{good.name} is good and untouched' if good else 'there is no older one'}; make room "
        "(or set a smaller keep for the checkpoint callback, or another --root) and continue with "
        "--resume auto"
    )
