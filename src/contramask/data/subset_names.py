"""Samples of a training set by a list of their names."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from contramask.data.tarball import IMAGES
from contramask.errors import UserError

_NAMED = 5  # names that an error lists


def by_name(file: str, keys: Sequence[str]) -> Bool[ndarray, " samples"]:
    """Which samples a list names, a line each.

    Raises:
        UserError: the file cannot be read, or a line names no sample, or several.
    """
    try:
        lines = Path(file).read_text("utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--subset_file {file} cannot be read: {error}") from error
    places = {key: i for i, key in enumerate(keys)}
    by_last: dict[str, list[int]] = {}
    for i, key in enumerate(keys):
        by_last.setdefault(_last(key), []).append(i)
    chosen, lost = np.zeros(len(keys), dtype=bool), []
    for line in lines:
        name = _stem(line)
        found = [places[name]] if name in places else by_last.get(_last(name), [])
        if len(found) > 1:
            raise UserError(
                f"--subset_file {file}: {line} may be {keys[found[0]]} or {keys[found[1]]}; where "
                "samples of several folders have one name, give whole keys"
            )
        if not found:
            lost.append(line)
        chosen[found] = True
    if lost or not lines:
        first = f", first {', '.join(sorted(lost)[:_NAMED])}" if lost else ""
        raise UserError(
            f"--subset_file {file}: {len(lost)} of {len(lines)} names are no sample of "
            f"data.train{first}; a line is the key of a sample, as {keys[0]!r} here"
        )
    return chosen


def _stem(name: str) -> str:
    """`n01440764/n01440764_10043.JPEG` -> `n01440764/n01440764_10043`."""
    stem, _, suffix = name.rpartition(".")
    return stem if stem and suffix.lower() in IMAGES else name


def _last(name: str) -> str:
    """Without folders."""
    return _stem(name).rsplit("/", 1)[-1]
