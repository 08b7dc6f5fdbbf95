"""Making, reading and checking the index of a set of shards."""

import json
import logging
import os
import posixpath
import tarfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

import numpy as np

from contramask.data import storage
from contramask.data.index_file import Index, index_name, place, read_index, write_index
from contramask.data.sources import Patterns, expand
from contramask.data.tarball import BLOCK, Shard, scan_or_say
from contramask.errors import UserError

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]  # done, of how many
Scan = tuple[Shard, list[str]] | str  # an entry and the flaws of its samples, or what is wrong


def build_index(
    patterns: Patterns,
    *,
    processes: int = 1,
    out: str | None = None,
    progress: Progress | None = None,
) -> Index:
    """Reads every shard once and writes the index beside them, or to the file `out`.

    Other shards that an index beside already lists stay in it. Raises `UserError` for a shard that
    cannot be read or is damaged; flaws of single samples are logged.
    """
    urls = expand(patterns, where="the shards to index")
    scanned = []
    for url, result in _scan_all(urls, processes, progress):
        if isinstance(result, str):
            raise UserError(f"{url}: {result}; restore this shard, or pack it again")
        shard, flaws = result
        for flaw in flaws[:10]:
            log.warning("%s: %s", url, flaw)
        if len(flaws) > 10:
            log.warning("%s: %d more flaws of this kind", url, len(flaws) - 10)
        scanned.append(shard)
    save_index(scanned, out=out)
    return Index(tuple(scanned))


def save_index(shards: Sequence[Shard], *, out: str | None = None) -> list[str]:
    """Writes index files beside the shards, or one file `out`; returns their names."""
    files: dict[str, list[Shard]] = {}
    for shard in shards:
        files.setdefault(out or index_name(shard.url), []).append(shard)
    for name, members in files.items():
        if not storage.is_local(name):
            raise UserError(f"{name}: an index is written to a local file; name one with --out")
        fresh = {place(shard.url) for shard in members}
        old = {} if out else read_index(name) or {}
        kept = [s for url, s in old.items() if url not in fresh and os.path.isfile(url)]
        write_index(name, [*kept, *members])
    return list(files)


def load_index(urls: Sequence[str], *, file: str | None = None) -> Index | None:
    """What the index says of these shards; None if there is no index at all.

    Raises `UserError` if some of the shards are not in it.
    """
    names = {file} if file else {index_name(url) for url in urls}
    found = [entries for name in sorted(names) if (entries := read_index(name)) is not None]
    if not found:
        if file:
            raise UserError(f"there is no index {file}; correct data.streaming.index")
        return None
    known = {url: shard for entries in found for url, shard in entries.items()}
    missing = [url for url in urls if place(url) not in known]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(urls)} shards are not in their index "
            f"{file or index_name(missing[0])}, first {missing[0]}; "
            "run `contramask pack index` over all of them"
        )
    return Index(tuple(replace(known[place(url)], url=url) for url in urls))


def check_shards(index: Index) -> None:
    """Holds every shard against its index by its size and by where its last sample begins.

    Other bytes in equal places are found by `contramask pack --check`, which reads everything.

    Raises `UserError` that names the first shard which is missing or is not the one indexed.
    """
    found = storage.sizes([shard.url for shard in index.shards])
    wrong = [
        f"{shard.url} is missing" if size is None
        else f"{shard.url} has {size} bytes, its index says {shard.bytes}"
        for shard, size in zip(index.shards, found, strict=True)
        if size != shard.bytes
    ]  # fmt: skip
    if not wrong:
        with ThreadPoolExecutor(16) as pool:
            wrong = [line for line in pool.map(_misplaced, index.shards) if line]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(
            f"{wrong[0]}{more}; restore the shard, or run `contramask pack index` if the change "
            "was meant"
        )


def _misplaced(shard: Shard) -> str:
    """What is wrong where the index has the last sample; empty if a member begins there."""
    if not shard.count:
        return ""
    try:
        (header,) = storage.read(shard.url, [storage.Span(int(shard.starts[-1]), BLOCK)])
        tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return f"{shard.url} has no sample at byte {shard.starts[-1]}, as its index says ({error})"
    except OSError as error:
        return f"{shard.url} cannot be read ({error})"
    return ""


def verify(
    patterns: Patterns,
    *,
    processes: int = 1,
    decode: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Reads every shard again; what is wrong, one line each, an empty list if nothing is.

    `decode` has every image decoded as well.
    """
    urls = expand(patterns, where="the shards to check")
    indexes = {name: read_index(name) for name in sorted({index_name(url) for url in urls})}
    wrong = [f"{name}: there is no such index" for name, found in indexes.items() if found is None]
    known = {url: shard for found in indexes.values() for url, shard in (found or {}).items()}
    sizes = zip(known, storage.sizes(list(known)), strict=True)
    wrong += [f"{url}: in the index but missing" for url, size in sizes if size is None]
    for url, result in _scan_all(urls, processes, progress, decode=decode):
        if isinstance(result, str):
            wrong.append(f"{url}: {result}")
            continue
        shard, flaws = result
        lines = [*flaws, *_disagreement(shard, known, indexes[index_name(url)] is not None)]
        wrong += [f"{url}: {line}" for line in lines]
    return wrong


def _disagreement(shard: Shard, known: dict[str, Shard], has_index: bool) -> list[str]:
    if not has_index:
        return []
    indexed = known.get(place(shard.url))
    return ["not in its index"] if indexed is None else differences(indexed, shard)


def differences(indexed: Shard, found: Shard) -> list[str]:
    """What of a shard is not as its index says."""
    lines = []
    for name in ("bytes", "count", "sha256", "suffixes", "labels"):
        old, new = getattr(indexed, name), getattr(found, name)
        if old != new:
            lines.append(f"{name} {new}, its index says {old}")
    same = np.array_equal(indexed.starts, found.starts)
    if not (same and np.array_equal(indexed.lengths, found.lengths)):
        lines.append("samples are not where its index says")
    return lines


def classes_of(urls: Iterable[str]) -> list[str] | None:
    """The names in the `classes.json` beside the shards, if there is one.

    Raises `UserError` if two folders disagree.
    """
    found: dict[str, list[str]] = {}
    for name in sorted({posixpath.join(posixpath.dirname(url), "classes.json") for url in urls}):
        try:
            found[name] = [str(entry) for entry in json.loads(storage.read_all(name))]
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise UserError(f"{name} is not a JSON list of class names: {error}") from None
    lists = list(found.items())
    for name, names in lists[1:]:
        if names != lists[0][1]:
            raise UserError(f"{name} and {lists[0][0]} name different classes; labels would clash")
    return lists[0][1] if lists else None


def _scan_all(
    urls: Sequence[str], processes: int, progress: Progress | None, *, decode: bool = False
) -> Iterable[tuple[str, Scan]]:
    """Scans in the order given, in other processes if more than one."""
    count, scan = min(processes, len(urls)), partial(scan_or_say, decode=decode)
    if count <= 1:
        yield from _reported(urls, map(scan, urls), progress)
        return
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        yield from _reported(urls, pool.map(scan, urls), progress)


def _reported(
    urls: Sequence[str],
    results: Iterable[Scan],
    progress: Progress | None,
) -> Iterable[tuple[str, Scan]]:
    for done, (url, result) in enumerate(zip(urls, results, strict=True), 1):
        if progress is not None:
            progress(done, len(urls))
        yield url, result
