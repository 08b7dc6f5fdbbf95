"""Where the images come from: patterns to addresses of shards, and how much of each source.

A pattern is a path, an address (`https://`, `s3://`, `gs://`), a folder (all its `*.tar`), a glob,
with braces (`train-{000000..000146}.tar`, `{a,b}`); several are joined by `::` or given as a list.
A dictionary of pattern -> weight mixes sources in these proportions.
"""

import glob
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from contramask.data import storage
from contramask.errors import UserError

Patterns = str | Sequence[str]
_NUMBERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(\d+))?")
_MOST = 1_000_000  # a pattern that gives more shards than this is a slip of the finger


@dataclass(frozen=True)
class Source:
    """A set of shards that is one place to draw from, and its share of the stream."""

    name: str
    shards: tuple[str, ...]
    weight: float = 1.0


def sources(
    spec: str | list[str] | dict[str, float], *, allow_pipe: bool = False, where: str = "data.train"
) -> list[Source]:
    """The sources a setting names; `where` is the setting, for the messages.

    Raises `UserError` when nothing matches, a shard is missing or listed twice, or a weight is
    not positive.
    """
    if isinstance(spec, Mapping):
        _check_weights(spec, where)
        found = [
            Source(name, tuple(expand(name, allow_pipe=allow_pipe, where=where)), weight)
            for name, weight in spec.items()
        ]
    else:
        patterns = [spec] if isinstance(spec, str) else list(spec)
        shards = tuple(expand(patterns, allow_pipe=allow_pipe, where=where))
        found = [Source("::".join(patterns), shards)]
    seen: set[str] = set()
    for shard in (shard for source in found for shard in source.shards):
        if shard in seen:
            raise UserError(
                f"{where}: {shard} is listed twice; each shard may belong to one source once; "
                f"change {where}"
            )
        seen.add(shard)
    return found


def expand(patterns: Patterns, *, allow_pipe: bool = False, where: str = "data.train") -> list[str]:
    """Addresses of all shards that patterns name, in the order given, sorted within a glob."""
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    if not given or not all(given):
        raise UserError(f"{where} names no shards; give a pattern such as 'shards/train-*.tar'")
    found: list[str] = []
    for pattern in given:
        for part in pattern.split("::"):
            found += _expand(part, allow_pipe, where)
    return found


def braces(text: str) -> Iterator[str]:
    """`x{1..3}{a,b}` -> x1a x1b x2a ...; as a shell does, with zero padding and nesting."""
    start = text.find("{")
    end = _closing(text, start)
    if start < 0 or end < 0:
        yield text
        return
    head, body, tail = text[:start], text[start + 1 : end], text[end + 1 :]
    if numbers := _NUMBERS.fullmatch(body):
        options: Sequence[str] = _count(*numbers.groups())
    elif len(parts := _split(body)) > 1:
        options = [option for part in parts for option in braces(part)]
    else:
        options = ["{" + inner + "}" for inner in braces(body)]
    for option, rest in product(options, list(braces(tail))):
        yield head + option + rest


def _expand(pattern: str, allow_pipe: bool, where: str) -> list[str]:
    pattern = pattern.removeprefix("file://")
    kind = storage.scheme(pattern)
    if kind == "pipe" and not allow_pipe:
        raise UserError(
            f"{where}: {pattern} would run a shell command; give a path or an address that fsspec "
            "opens (https://, s3://, gs://), or set data.streaming.allow_pipe to true"
        )
    if not kind:
        pattern = os.path.expanduser(pattern)
    urls = list(braces(pattern))
    if len(urls) > _MOST:
        raise UserError(f"{where}: {pattern} names {len(urls)} shards, allowed are {_MOST}")
    found = urls if kind == "pipe" else [url for each in urls for url in _match(each, where)]
    present = found if kind else [url for url in found if os.path.isfile(url)]
    if not present:
        raise UserError(
            f"{where}: no shards match {pattern} (in {os.getcwd()}); correct the pattern, or make "
            "shards with `contramask pack`"
        )
    if len(present) < len(found):
        missing = [url for url in found if not os.path.isfile(url)]
        raise UserError(
            f"{where}: {len(missing)} of the {len(found)} shards of {pattern} are missing: "
            f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}; restore them or "
            f"change {where}"
        )
    return found


def _match(url: str, where: str) -> list[str]:
    """What one address stands for: itself, or the shards of a folder or a glob."""
    magic = any(c in url for c in "*?[")
    if storage.is_local(url):
        if os.path.isdir(url):
            return sorted(glob.glob(os.path.join(glob.escape(url), "*.tar")))
        return sorted(glob.glob(url)) if magic else [url]
    try:
        files = storage.filesystem(url)
    except ImportError as error:
        raise UserError(_missing_package(url, where, error)) from None
    except ValueError as error:
        raise UserError(f"{where}: {url}: {error}; allowed are https, s3, gs and paths") from None
    if not magic and not url.endswith("/"):
        return [url]
    names = files.glob(url + "*.tar" if url.endswith("/") else url)
    return sorted(files.unstrip_protocol(name) for name in names)


def _missing_package(url: str, where: str, error: ImportError) -> str:
    extra = {"s3": "s3", "gs": "gcs", "gcs": "gcs"}.get(storage.scheme(url))
    how = f"install contramask[{extra}]" if extra else "install it"
    return f"{where}: {url} needs a package that is not installed ({error}); {how}"


def _check_weights(spec: Mapping[str, float], where: str) -> None:
    for name, weight in spec.items():
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(
                f"{where}: the weight of {name} is {weight}; weights are positive numbers, "
                f"and only their ratios count; change it in {where}"
            )


def _closing(text: str, start: int) -> int:
    """Where the brace opened at `start` closes; -1 if nowhere."""
    depth = 0
    for i in range(max(start, 0), len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0 and text[i] == "}":
            return i
    return -1


def _split(body: str) -> list[str]:
    """At the commas outside inner braces."""
    parts, depth = [""], 0
    for c in body:
        depth += {"{": 1, "}": -1}.get(c, 0)
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def _count(first: str, last: str, step: str | None) -> list[str]:
    """Numbers from first to last, padded to the wider of the two where either begins with 0."""
    padded = any(len(n.lstrip("-")) > 1 and n.lstrip("-").startswith("0") for n in (first, last))
    width = max(len(first), len(last)) if padded else 0
    a, b, by = int(first), int(last), int(step or 1) or 1
    if abs(b - a) // by > _MOST:
        raise UserError(f"{{{first}..{last}}} names more than {_MOST} shards")
    return [f"{n:0{width}d}" for n in range(a, b + (1 if b >= a else -1), by if b >= a else -by)]
