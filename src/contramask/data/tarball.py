"""Shards as files: one pass over a tar that finds every sample and every damage.

tarfile (and webdataset on top of it) takes a damaged header in the middle of an archive for its
end and says nothing; this reader does not.

Nothing here imports torch, so that processes which only move bytes start fast.
"""

import hashlib
import re
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from contramask.data import storage
from contramask.data.decode import BadImage, open_picture

BLOCK = tarfile.BLOCKSIZE  # 512: tar counts in blocks of this many bytes
IMAGES = ("jpg", "jpeg", "png", "webp")
# The members that are read. Whatever else a tar holds is passed over, never opened.
SUFFIXES = (*IMAGES, "cls", "json", "seg.png")

_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")  # webdataset keeps its own notes under such names
_ZEROS = bytes(BLOCK)
_LABEL_BYTES = 64
_WITHOUT_DATA = set(tarfile.SUPPORTED_TYPES) - set(tarfile.REGULAR_TYPES)


class Damaged(ValueError):
    """A tar that is not whole; the message says where and what."""


@dataclass(frozen=True, eq=False)
class Shard:
    """What the index knows of one shard: sample i is bytes [starts[i], starts[i] + lengths[i])."""

    url: str
    bytes: int
    sha256: str
    starts: np.ndarray  # (count,) int64, of the header of the first member
    lengths: np.ndarray  # (count,) int64
    suffixes: dict[str, int]  # how many members of each read suffix
    foreign: dict[str, int] = field(default_factory=dict)  # and of each suffix passed over
    labels: int = 0  # the highest label + 1; 0 where no sample has one

    @property
    def count(self) -> int:
        """The number of samples."""
        return len(self.starts)

    @property
    def labelled(self) -> bool:
        """Whether its samples are expected to have labels."""
        return "cls" in self.suffixes


def split_name(name: str) -> tuple[str, str] | None:
    """`a/b.seg.png` -> (`a/b`, `seg.png`), as webdataset groups members; None for its own notes."""
    match = _KEY.fullmatch(name)
    return None if match is None or _META.match(name) else (match[1], match[2].lower())


def scan(url: str, *, decode: bool = False) -> tuple[Shard, list[str]]:
    """One pass over a tar: its entry for the index, and what is wrong with single samples.

    `decode` has every image decoded, which takes some milliseconds each. Raises `Damaged` when the
    tar as a whole cannot be trusted, and OSError when it cannot be read.
    """
    with storage.open_stream(url) as stream:
        return _Scan(stream, url, decode=decode).run()


def scan_or_say(url: str, *, decode: bool = False) -> tuple[Shard, list[str]] | str:
    """`scan`, with what is wrong as a result: it travels between processes."""
    try:
        return scan(url, decode=decode)
    except Damaged as error:
        return str(error)
    except OSError as error:
        return f"unreadable ({error})"


class _Scan:
    def __init__(self, stream: Any, url: str, *, decode: bool) -> None:
        self.stream, self.url, self.decode = stream, url, decode
        self.hash = hashlib.sha256()
        self.at = 0  # bytes read so far
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.key: str | None = None
        self.members: list[str] = []
        self.keys: set[str] = set()
        self.suffixes: Counter[str] = Counter()
        self.foreign: Counter[str] = Counter()
        self.labels = 0
        self.unlabelled: list[str] = []
        self.flaws: list[str] = []

    def run(self) -> tuple[Shard, list[str]]:
        start, extra = 0, dict[str, str]()
        while (header := self._read(BLOCK)) != _ZEROS:
            info = self._header(header)
            if info.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                extra |= _extended(info, self._data(info.size, keep=True))
                continue
            size = int(extra.get("size", info.size))
            carries = info.isreg() or info.type not in _WITHOUT_DATA
            self._member(extra.get("path", info.name), info.isreg(), start, size if carries else 0)
            start, extra = self.at, {}
        self._close()
        self._end()
        if self.suffixes["cls"]:
            self.flaws += [f"{key}: no label" for key in self.unlabelled]
        starts = np.array(self.starts, dtype=np.int64)
        shard = Shard(
            url=self.url,
            bytes=self.at,
            sha256=self.hash.hexdigest(),
            starts=starts,
            lengths=np.array(self.ends, dtype=np.int64) - starts,
            suffixes={k: self.suffixes[k] for k in SUFFIXES if self.suffixes[k]},
            foreign=dict(sorted(self.foreign.items())),
            labels=self.labels,
        )
        return shard, self.flaws

    def _header(self, header: bytes) -> tarfile.TarInfo:
        where = f"at byte {self.at - len(header)}, after {len(self.starts)} samples"
        if len(header) < BLOCK:
            what = "cut short" if self.at else "empty"
            raise Damaged(f"{what} {where}")
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            what = "damaged header" if self.starts else "not a tar"
            raise Damaged(f"{what} {where} ({error})") from None
        if info.type == tarfile.GNUTYPE_SPARSE:
            raise Damaged(f"sparse member {where}; write the tar without --sparse")
        return info

    def _member(self, name: str, regular: bool, start: int, size: int) -> None:
        named = split_name(name) if regular else None
        key, suffix = named or (None, "")
        wanted = key is not None and suffix in SUFFIXES
        look = suffix == "cls" or (self.decode and suffix in IMAGES)
        data = self._data(size, keep=wanted and look)
        if not wanted:
            if regular:
                self.foreign[suffix or name] += 1
            return
        if key != self.key:
            self._close()
            self._open(key, start)
        if suffix in self.members:
            self.flaws.append(f"{key}: two members .{suffix}")
        self.members.append(suffix)
        self.suffixes[suffix] += 1
        self.ends[-1] = self.at
        if suffix == "cls":
            self._label(key, data)
        elif look:
            self._image(key, data)

    def _open(self, key: str | None, start: int) -> None:
        assert key is not None
        if key in self.keys:
            self.flaws.append(f"{key}: its members are not next to each other")
        self.keys.add(key)
        self.key, self.members = key, []
        self.starts.append(start)
        self.ends.append(start)

    def _close(self) -> None:
        if self.key is not None:
            if not set(self.members) & set(IMAGES):
                self.flaws.append(f"{self.key}: no image")
            if "cls" not in self.members:
                self.unlabelled.append(self.key)

    def _label(self, key: str | None, data: bytes) -> None:
        try:
            label = int(data[:_LABEL_BYTES])
        except ValueError:
            label = -1
        if label < 0:
            self.flaws.append(f"{key}: its label is {data[:20]!r}, not a number from 0 on")
        self.labels = max(self.labels, label + 1)

    def _image(self, key: str | None, data: bytes) -> None:
        try:
            open_picture(data).pixels(reduce=8)
        except BadImage as error:
            self.flaws.append(f"{key}: {error}")

    def _data(self, size: int, *, keep: bool) -> bytes:
        """Passes over a member's bytes and the padding to a whole block."""
        begin, padded = self.at, -(-size // BLOCK) * BLOCK
        kept, left = [], padded
        while left and (part := self._read(min(left, 1 << 20))):
            left -= len(part)
            if keep:
                kept.append(part)
        if left:
            raise Damaged(
                f"cut short inside the member that begins at byte {begin - BLOCK}, "
                f"near sample {len(self.starts)}"
            )
        return b"".join(kept)[:size]

    def _end(self) -> None:
        """After the mark of the end only zeros may come: anything else is a wiped header."""
        mark = self.at - BLOCK
        while part := self._read(1 << 20):
            if part.strip(b"\0"):
                raise Damaged(
                    f"zeroed header at byte {mark}: data after the end of the archive, "
                    f"after {len(self.starts)} samples"
                )

    def _read(self, count: int) -> bytes:
        data = self.stream.read(count)
        while 0 < len(data) < count and (more := self.stream.read(count - len(data))):
            data += more
        self.at += len(data)
        self.hash.update(data)
        return data


def _extended(info: tarfile.TarInfo, data: bytes) -> dict[str, str]:
    """`path` and `size` from a pax header, `path` from a GNU long name."""
    if info.type == tarfile.GNUTYPE_LONGLINK:
        return {}
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    found, at = {}, 0
    while match := re.compile(rb"(\d+) ([^=]+)=").match(data, at):
        record = data[at : at + int(match[1])]
        if match[2] in (b"path", b"size") and record.endswith(b"\n"):
            value = record[match.end() - at : -1].decode("utf-8", "surrogateescape")
            found[match[2].decode()] = value
        at += max(int(match[1]), 1)
    return found
