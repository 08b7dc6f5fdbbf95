"""Bytes at addresses: local files, and whatever fsspec opens (http, s3, gs), read by ranges.

Nothing here imports torch, so that processes which only move bytes start fast. Nothing is kept
open between two calls: no file descriptor can leak, and a fork finds nothing half used.
"""

import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

log = logging.getLogger(__name__)
T = TypeVar("T")

# Neighbouring spans are read at once up to this many bytes; the parts are copied out of it.
LOCAL_RUN, REMOTE_RUN = 8 << 20, 32 << 20
# At 100 MB/s and 20 ms a request, reading through a gap of 2 MB costs what another request does.
REMOTE_GAP = 2 << 20
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between attempts at a remote address


class Span(NamedTuple):
    """Bytes [start, start + length) of a file."""

    start: int
    length: int


def scheme(url: str) -> str:
    """`s3` of `s3://bucket/x`; empty for a local path, `pipe` for a command."""
    if url.startswith("pipe:"):
        return "pipe"
    return urlsplit(url).scheme if "://" in url else ""


def is_local(url: str) -> bool:
    """Whether this is a path of this machine."""
    return scheme(url) == ""


def filesystem(url: str) -> Any:
    """fsspec's file system for an address. Kept by fsspec, anew in every process."""
    import fsspec  # 0.1 s that local files need not pay

    return fsspec.filesystem(scheme(url))


def size(url: str) -> int:
    """Bytes of a file. Raises FileNotFoundError, or another OSError."""
    if is_local(url):
        return os.stat(url).st_size
    return int(_again(url, lambda: filesystem(url).size(url)) or 0)


def sizes(urls: Sequence[str]) -> list[int | None]:
    """Bytes of many files, None for those that are not there. Asked 16 at a time."""

    def one(url: str) -> int | None:
        try:
            return size(url)
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(min(16, max(1, len(urls)))) as pool:
        return list(pool.map(one, urls))


def read(url: str, spans: Sequence[Span]) -> list[bytes]:
    """The bytes of each span, in the order asked. A short answer means that the file is short."""
    order = sorted(range(len(spans)), key=lambda i: spans[i].start)
    parts = [b""] * len(spans)
    local = is_local(url)
    limit, gap = (LOCAL_RUN, 0) if local else (REMOTE_RUN, REMOTE_GAP)
    runs = list(_runs([spans[i] for i in order], limit, gap))
    read_run = _local_reader(url) if local else lambda run: _remote(url, run)
    for run, first, last in runs:
        data = read_run(run)
        for i in order[first:last]:
            begin = spans[i].start - run.start
            parts[i] = data[begin : begin + spans[i].length]
    return parts


def read_all(url: str) -> bytes:
    """A whole small file. Raises FileNotFoundError, or another OSError."""
    if is_local(url):
        with open(url, "rb") as file:
            return file.read()
    return _again(url, lambda: filesystem(url).cat_file(url))


def open_stream(url: str) -> Any:
    """A binary file to be read once from its start, as a context.

    `pipe:` runs a shell: callers ask before.
    """
    kind = scheme(url)
    if kind == "pipe":
        return _Pipe(url.removeprefix("pipe:"))
    if not kind:
        return open(url, "rb")
    return _again(url, lambda: filesystem(url).open(url, "rb", block_size=REMOTE_RUN))


def _runs(spans: Sequence[Span], limit: int, gap: int) -> Iterable[tuple[Span, int, int]]:
    """Sorted spans -> (span to read at once, first, last): spans[first:last] lie within it."""
    cuts = [0] if spans else []
    for i, (a, b) in enumerate(pairwise(spans), 1):
        begin = spans[cuts[-1]].start
        if b.start - (a.start + a.length) > gap or b.start + b.length - begin > limit:
            cuts.append(i)
    for first, last in pairwise([*cuts, len(spans)]):
        begin = spans[first].start
        end = max(s.start + s.length for s in spans[first:last])
        yield Span(begin, end - begin), first, last


def _local_reader(url: str) -> Callable[[Span], bytes]:
    def read_run(run: Span) -> bytes:
        with open(url, "rb", buffering=0) as file:
            file.seek(run.start)
            data = file.read(run.length)
            while len(data) < run.length and (more := file.read(run.length - len(data))):
                data += more
            return data

    return read_run


def _remote(url: str, run: Span) -> bytes:
    end = run.start + run.length
    data = _again(url, lambda: filesystem(url).cat_file(url, start=run.start, end=end))
    if len(data) > run.length:
        _warn_of_whole_files(urlsplit(url).netloc)
        return data[run.start : end]
    return data


@lru_cache(maxsize=64)
def _warn_of_whole_files(host: str) -> None:
    log.warning("%s ignores range requests: every read downloads a whole shard", host)


def _again(url: str, attempt: Callable[[], T]) -> T:
    """Repeats what a network may spoil; raises OSError that names the address at the end."""
    import aiohttp  # only where there is a network

    for pause in (*PAUSES, None):
        try:
            return attempt()
        except (FileNotFoundError, PermissionError):
            raise
        except (OSError, aiohttp.ClientError) as error:
            status = error.status if isinstance(error, aiohttp.ClientResponseError) else 0
            final = pause is None or (400 <= status < 500 and status not in (408, 429))
            if final:
                raise OSError(f"{url}: {type(error).__name__}: {error}") from error
            log.warning("%s: %s: %s; trying again", url, type(error).__name__, error)
            time.sleep(pause or 0)
    raise AssertionError("unreachable")


class _Pipe:
    """The output of a shell command; one that fails is an OSError at the end of its output."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE)

    def read(self, count: int = -1) -> bytes:
        assert self.process.stdout is not None
        data = self.process.stdout.read(count)
        if not data and count and (code := self.process.wait()):
            raise OSError(f"pipe:{self.command} ended with code {code}")
        return data

    def close(self) -> None:
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process.kill()  # a worker's children are deaf to SIGTERM, as it is itself
        self.process.wait()

    def __enter__(self) -> "_Pipe":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
