"""Images to WebDataset shards: the same bytes every time, whatever the number of processes."""

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from contramask.data.index import save_index
from contramask.data.originals import Encoding, Original, read_many
from contramask.data.shuffle import shuffled
from contramask.data.tarball import Shard
from contramask.data.tarwriter import TarWriter
from contramask.errors import UserError

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]  # done, of how many
_CHUNK = 16  # images a process is given at a time


@dataclass(frozen=True)
class Packing:
    """How shards are written.

    Attributes:
        max_mb: megabytes (10^6) of a shard, at most, unless one sample is larger.
        max_count: samples of a shard, at most.
        seed: of the order of the samples; None: as listed. Training reads neighbours together, so
            shards should not be sorted by class.
        processes: that read, check and encode images.
        encoding: what is done to the images.
        max_bad: the fraction of images that may be left out as bad.
        overwrite: whether shards of the same name may be replaced.
    """

    max_mb: float = 1000.0
    max_count: int = 10_000
    seed: int | None = 0
    processes: int = 1
    encoding: Encoding = field(default_factory=Encoding)
    max_bad: float = 0.01
    overwrite: bool = False


class Packed(NamedTuple):
    """What was written, and the images that were left out, with the reason."""

    shards: list[Shard]
    bad: list[str]


def pack(
    originals: Sequence[Original],
    prefix: str | Path,
    *,
    classes: Sequence[str] | None = None,
    packing: Packing | None = None,
    progress: Progress | None = None,
) -> Packed:
    """Writes PREFIX-000000.tar and so on, their index, and `classes.json` beside them.

    Nothing of that name is there before all is written. Raises `UserError` when shards are already
    there, other classes are, or too many images are bad; then nothing is left behind.
    """
    packing = packing or Packing()
    prefix = Path(prefix)
    _check_classes(prefix.parent, classes)
    count = len(originals)
    order = range(count) if packing.seed is None else shuffled(count, packing.seed).tolist()
    writer = ShardWriter(
        prefix, max_mb=packing.max_mb, max_count=packing.max_count, overwrite=packing.overwrite
    )
    bad: list[str] = []
    with writer, _full_disk(prefix):
        results = _read_all([originals[i] for i in order], packing)
        for done, (i, members) in enumerate(zip(order, results, strict=True), 1):
            if isinstance(members, str):
                bad.append(f"{originals[i].path}: {members}")
                _check(bad, count, packing.max_bad)
            else:
                writer.add(f"{done - 1:08d}", members)
            if progress is not None and (done % _CHUNK == 0 or done == count):
                progress(done, count)
        shards = writer.finish()
    if classes is not None:
        write_classes(prefix.parent, classes)
    return Packed(shards, bad)


def _check_classes(folder: Path, classes: Sequence[str] | None) -> None:
    known = read_classes(folder)
    if known is not None and classes is not None and known != list(classes):
        raise UserError(
            f"{folder}/classes.json names other classes ({', '.join(known[:3])} ...) than these "
            f"images have ({', '.join(classes[:3])} ...); pack them into another folder"
        )


def read_classes(folder: Path) -> list[str] | None:
    """The names in the `classes.json` of a folder of shards, if there is one."""
    file = folder / "classes.json"
    return [str(name) for name in json.loads(file.read_text("utf-8"))] if file.is_file() else None


def write_classes(folder: Path, classes: Sequence[str]) -> None:
    """Writes `classes.json` beside its final name, then renames it."""
    part = folder / "classes.json.part"
    part.write_text(json.dumps(list(classes), ensure_ascii=False, indent=1) + "\n", "utf-8")
    os.replace(part, folder / "classes.json")


class ShardWriter:
    """Writes samples into shards of bounded size; a context, which cleans up when it fails.

    with ShardWriter(prefix) as writer:
        writer.add(key, {"png": ..., "cls": ...})
        shards = writer.finish()
    """

    def __init__(
        self,
        prefix: str | Path,
        *,
        max_mb: float = 1000.0,
        max_count: int = 10_000,
        overwrite: bool = False,
    ) -> None:
        self.prefix = Path(prefix)
        self.max_bytes, self.max_count = int(max_mb * 1e6), max_count
        self.old = sorted(self.prefix.parent.glob(f"{self.prefix.name}-[0-9]*.tar"))
        if self.old and not overwrite:
            raise UserError(
                f"{self.old[0]} is already there; choose another prefix than {prefix}, or replace "
                "the shards with --overwrite"
            )
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self.tar: TarWriter | None = None
        self.tars: list[TarWriter] = []
        self.shards: list[Shard] = []

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for tar in self.tars:  # nothing of it is left after `finish`
            tar.abort()

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """One sample: suffix -> bytes."""
        size = TarWriter.cost(members)
        tar = self.tar
        if tar is None or tar.count >= self.max_count or tar.bytes + size > self.max_bytes:
            tar = self._next()
        tar.add(key, members)

    def finish(self) -> list[Shard]:
        """Gives all shards their names and writes their index."""
        if self.tar is None:
            raise UserError(f"there is not one good sample to write to {self.prefix}-000000.tar")
        self.shards.append(self.tar.close())
        for tar in self.tars:
            os.replace(tar.part, tar.path)
        fresh = {tar.path for tar in self.tars}
        for path in self.old:
            if path not in fresh:
                path.unlink()
        save_index(self.shards)
        return self.shards

    def _next(self) -> TarWriter:
        if self.tar is not None:
            self.shards.append(self.tar.close())
        name = f"{self.prefix.name}-{len(self.tars):06d}.tar"
        self.tar = TarWriter(self.prefix.parent / name)
        self.tars.append(self.tar)
        return self.tar


@contextmanager
def _full_disk(prefix: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{prefix}-*.tar cannot be written ({error.strerror}); nothing was left behind; make "
            "room, or choose another place"
        ) from error


def _check(bad: list[str], count: int, max_bad: float) -> None:
    if len(bad) > max_bad * count:
        raise UserError(
            f"{len(bad)} of {count} images are bad, more than the allowed fraction of {max_bad:g}: "
            f"{'; '.join(bad[-3:])}; repair or remove them, or raise --max-bad; nothing was written"
        )


def _read_all(originals: Sequence[Original], packing: Packing) -> Iterator[dict[str, bytes] | str]:
    """Members in the order given; with several processes, a bounded number of images ahead."""
    chunks = (originals[i : i + _CHUNK] for i in range(0, len(originals), _CHUNK))
    if packing.processes <= 1:
        for chunk in chunks:
            yield from read_many(chunk, packing.encoding)
        return
    with ProcessPoolExecutor(packing.processes, mp_context=get_context("spawn")) as pool:
        yield from _in_order(pool, chunks, packing)


def _in_order(
    pool: ProcessPoolExecutor, chunks: Iterable[Sequence[Original]], packing: Packing
) -> Iterator[dict[str, bytes] | str]:
    waiting: deque[Future[list[dict[str, bytes] | str]]] = deque()
    ahead = iter(chunks)
    try:
        while True:
            for chunk in islice(ahead, 3 * packing.processes - len(waiting)):
                waiting.append(pool.submit(read_many, chunk, packing.encoding))
            if not waiting:
                return
            yield from waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
