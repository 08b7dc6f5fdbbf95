"""Numbers and names as the report writes them, and what intervals allow to be said."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from contramask.analysis.reading import Reading


@dataclass(frozen=True)
class Measured:
    """One place of a reading. `low` and `high` are NaN where no interval was taken.

    A share in [0, 1] is written in percent.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    unit: str = ""
    share: bool = False

    @property
    def sure(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def apart(self, other: "Measured") -> bool:
        """Whether both have intervals and these do not touch."""
        sure = self.sure and other.sure
        return sure and (self.low > other.high or other.low > self.high)

    def __str__(self) -> str:
        scale, unit = (100.0, " %") if self.share else (1.0, f" {self.unit}".rstrip())
        text = f"{number(scale * self.value)}{unit}"
        if self.sure:
            text += f" [{number(scale * self.low)}, {number(scale * self.high)}]"
        return text


def number(value: float) -> str:
    """124, 12.4, 1.24 and 0.124: at most three digits after the point; a true minus sign."""
    size = abs(value)
    if size and not 5e-4 <= size < 1e9:
        text = f"{value:.1e}"
    else:
        text = f"{value:,.{sum(size < bound for bound in (99.95, 9.995, 0.9995))}f}"
    return text.replace("-", "\u2212")


def at(reading: Reading | None, *labels: str, share: bool = False) -> Measured | None:
    """A reading at labels, one for each of its axes; None where there is no value or no label."""
    if reading is None or len(labels) != len(reading.axes):
        return None
    place: list[int] = []
    for label, axis in zip(labels, reading.axes.values(), strict=True):
        if label not in axis:
            return None
        place.append(axis.index(label))
    index = tuple(place)
    if bool(reading.missing[index]):
        return None
    ends = [math.nan if t is None else float(t[index]) for t in (reading.low, reading.high)]
    return Measured(float(reading.value[index]), ends[0], ends[1], reading.unit, share)


def listed(words: Iterable[str]) -> str:
    """`a, b and c`."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def ranked(found: Mapping[str, Measured]) -> dict[str, Measured]:
    """From the largest value to the smallest."""
    return dict(sorted(found.items(), key=lambda item: -item[1].value))


def values(found: Mapping[str, Measured]) -> str:
    """`A: 114 px [112, 116]; B: 80.0 px [78.0, 82.0]`, the largest first."""
    return "; ".join(f"{name}: {value}" for name, value in ranked(found).items())


def differences(found: Mapping[str, Measured]) -> str:
    """What the intervals say of all pairs, in a sentence; empty for a single one.

    Two differ only if their intervals do not touch. Intervals that overlap show no difference,
    which is not the same as showing that there is none.
    """
    sure = {name: value for name, value in found.items() if value.sure}
    pairs = list(itertools.combinations(sure, 2))
    overlapping = [(a, b) for a, b in pairs if not sure[a].apart(sure[b])]
    unsure = [name for name in found if name not in sure]
    said = [_of_pairs(pairs, overlapping)] if pairs else []
    if unsure and len(found) > 1:
        whose = "" if len(unsure) == len(found) else f" for {listed(unsure)}"
        said.append(f"No intervals were taken{whose}, so no difference is claimed.")
    return " ".join(said)


def _of_pairs(pairs: Sequence[tuple[str, str]], overlapping: Sequence[tuple[str, str]]) -> str:
    if not overlapping:
        if len(pairs) == 1:
            return "The intervals do not overlap."
        return "No two intervals overlap: all differ."
    if len(overlapping) == len(pairs):
        every = "All intervals" if len(pairs) > 1 else "The intervals"
        return f"{every} overlap: no difference is shown."
    which = listed(f"{a} and {b}" for a, b in overlapping) if len(overlapping) < 4 else ""
    if not which:
        return f"The intervals of {len(overlapping)} of {len(pairs)} pairs overlap; others differ."
    return f"The intervals of {which} overlap; all other pairs differ."


def plain(text: str) -> str:
    """A name as matplotlib writes it letter by letter: `$` begins no formula."""
    return text.replace("$", r"\$")


def short(names: Iterable[str], most: int = 24) -> dict[str, str]:
    """name -> at most `most` characters of it, different for different names, for figures."""
    found: dict[str, str] = {}
    for name in names:
        half = (most - 1) // 2
        text = name if len(name) <= most else f"{name[:half]}\u2026{name[-half:]}"
        times = itertools.count(2)
        while text in found.values():
            text = f"{text[: most - 4]}\u2026 {next(times)}"
        found[name] = text
    return found
