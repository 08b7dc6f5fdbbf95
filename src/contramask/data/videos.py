"""Videos with the mask of every object in every frame, in the layout of DAVIS 2017.

    ROOT/ImageSets/2017/val.txt            names of videos, one a line
    ROOT/JPEGImages/480p/VIDEO/00000.jpg   frames
    ROOT/Annotations/480p/VIDEO/00000.png  masks: palette PNG, a pixel is the index of its object
    ROOT/davis_semantics.json              {VIDEO: {"1": CATEGORY}}; may be missing

Pont-Tuset et al., "The 2017 DAVIS Challenge on Video Object Segmentation" (arXiv:1704.00675).
"""

import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from torch import Tensor

from contramask.data.video_files import VOID, other_size, read_mask, size_of
from contramask.types import UserError, fold

FRAMES, MASKS, SETS = "JPEGImages", "Annotations", "ImageSets"
CATEGORIES = ("davis_semantics.json", "categories.json")


@dataclass(frozen=True)
class Video:
    """One video.

    Attributes:
        name: of its folder.
        frames: in order of time.
        masks: one for each frame; None where there is none.
        size: (height, width) of frames and masks.
        objects: the indices of the objects in its first mask, ascending.
        categories: of objects by index, where they are known.
        stamp: a checksum of the files' names, lengths and times.
    """

    name: str
    frames: tuple[Path, ...]
    masks: tuple[Path | None, ...]
    size: tuple[int, int]
    objects: tuple[int, ...]
    categories: dict[int, str] = field(default_factory=dict)
    stamp: int = 0

    def mask(self, index: int) -> UInt8[Tensor, "H W"] | None:
        """The mask of a frame; None where there is none."""
        path = self.masks[index]
        return None if path is None else read_mask(path, self.size)


@dataclass(frozen=True)
class VideoSet:
    """Videos that can be tracked, and why others cannot: name -> reason."""

    videos: list[Video]
    skipped: dict[str, str]


def find_videos(
    root: Path,
    *,
    split: str = "val",
    year: str = "2017",
    resolution: str = "480p",
    categories: Path | None = None,
    limit: int | None = None,
) -> VideoSet:
    """The videos of a set, with sizes checked by the files' headers.

    Videos of one frame, without a first mask, or without an object in it are skipped.

    Args:
        root: the folder that holds JPEGImages, Annotations and ImageSets.
        split: the name of the list: train, val.
        year: the folder of the list.
        resolution: the folder of frames and masks: 480p, Full-Resolution.
        categories: a JSON {VIDEO: {"1": CATEGORY}}; None: ROOT/davis_semantics.json or
            ROOT/categories.json, if there is one.
        limit: the first so many videos of the list.

    Raises:
        UserError: a file or folder is missing or empty, a name is a path, a frame is missing, a
            size differs, or no video is left.
    """
    if limit is not None and limit < 1:
        raise UserError(f"videos: limit is {limit}; it is at least 1; set --limit")
    listed = root / SETS / year / f"{split}.txt"
    try:
        lines = listed.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"videos: {listed} cannot be read; a folder in the layout of DAVIS 2017 has it; set "
            "--videos, --set and --year"
        ) from error
    names = _names(listed, lines)[:limit]
    if not names:
        raise UserError(f"videos: {listed} names no video; it needs one a line; set --set")
    known = _categories(root, categories)
    videos, skipped = [], {}
    for name in names:
        found = _video(root, resolution, name, known.get(name))
        if isinstance(found, Video):
            videos.append(found)
        else:
            skipped[name] = found
    if not videos:
        name, reason = next(iter(skipped.items()))
        raise UserError(
            f"videos: none of the {len(skipped)} videos of {listed} can be tracked; the first, "
            f"{name}: {reason}; set --set or --resolution"
        )
    return VideoSet(videos, skipped)


def _names(listed: Path, lines: list[str]) -> list[str]:
    """The names of a list, each once. They become folders, here and where results are written."""
    names: dict[str, None] = {}
    for number, line in enumerate(lines, start=1):
        name = line.strip()
        if name in (".", "..") or any(mark in name for mark in "/\\\0"):
            raise UserError(
                f"videos: line {number} of {listed} is {line!r}; a line is the name of a folder "
                "and no path; correct the list, or set --set"
            )
        if name:
            names[name] = None
    return list(names)


def _video(root: Path, resolution: str, name: str, known: Any) -> Video | str:
    """A video, or why it cannot be tracked."""
    frames = _files(root / FRAMES / resolution / name, (".jpg", ".jpeg", ".png"))
    folder = root / MASKS / resolution / name
    masks = _files(folder, (".png",)) if folder.is_dir() else {}
    if not frames:
        raise UserError(
            f"videos: {root / FRAMES / resolution / name} has no frames; {name} is in the set; "
            "add them, take it out of the list, or set --resolution"
        )
    _check_numbers(name, list(frames))
    if lost := sorted(masks.keys() - frames.keys()):
        raise UserError(
            f"videos: {masks[lost[0]]} is the mask of a frame that is missing ({len(lost)} such "
            f"in {name}); add {lost[0]}.jpg or remove the mask"
        )
    first = next(iter(frames))
    if len(frames) < 2:
        return "it has one frame only"
    if first not in masks:
        return f"its first frame {first} has no mask"
    size = size_of(frames[first])
    for path in (*frames.values(), *masks.values()):
        if (found := size_of(path)) != size:
            raise UserError(other_size(path, found, size))
    objects = tuple(int(i) for i in read_mask(masks[first], size).unique() if i)
    if not objects:
        return f"no object in its first mask {first} (0 and {VOID} are background)"
    every = [*frames.values(), *masks.values()]
    stats = [(path.name, path.stat()) for path in every]
    stamp = fold(*(f"{n}:{s.st_size}:{s.st_mtime_ns}" for n, s in stats))
    told = known.items() if isinstance(known, dict) else ()
    named = {int(i): str(c) for i, c in told if i.isdecimal()}
    shown = tuple(frames.values()), tuple(masks.get(stem) for stem in frames)
    return Video(name, *shown, size, objects, named, stamp)


def _files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Stem -> path, in order of names."""
    if not folder.is_dir():
        return {}
    found = [path for path in folder.iterdir() if path.suffix.lower() in suffixes]
    found.sort(key=lambda path: (int(path.stem) if path.stem.isdecimal() else 0, path.name))
    return {path.stem: path for path in found}


def _check_numbers(name: str, stems: list[str]) -> None:
    """Numbered frames go in even steps (DAVIS: 1)."""
    if len(stems) < 3 or not all(stem.isdecimal() for stem in stems):
        return
    numbers = [int(stem) for stem in stems]
    steps = [b - a for a, b in pairwise(numbers)]
    if len(set(steps)) > 1:
        at = next(i for i, step in enumerate(steps) if step != min(steps))
        raise UserError(
            f"videos: frames of {name} are missing between {stems[at]} and {stems[at + 1]}; "
            f"numbers go in steps of {min(steps)}; add them or take {name} out of the list"
        )


def _categories(root: Path, path: Path | None) -> dict[str, Any]:
    if path is None:
        path = next((root / name for name in CATEGORIES if (root / name).is_file()), None)
        if path is None:
            return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"videos: {path} cannot be read as JSON ({error}); it holds "
            '{VIDEO: {"1": CATEGORY}}; set --categories'
        ) from error
    return content if isinstance(content, dict) else {}
