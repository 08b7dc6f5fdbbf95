"""What the figures of one report have in common: where they go, short names, colours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from contramask.analysis.reading import Reading
from contramask.analysis.study import Study
from contramask.report.claims_classes import FEATURES
from contramask.report.depth import Panel
from contramask.report.style import COLOURS
from contramask.report.words import short

Named = Mapping[str, Reading]


@dataclass(frozen=True)
class Canvas:
    """Colours are by model and the same in all figures; pairs take those after the models'.

    Attributes:
        study: what is drawn.
        folder: where figures go.
        names: model -> its name in figures.
    """

    study: Study
    folder: Path
    names: Mapping[str, str]

    @classmethod
    def of(cls, study: Study, folder: Path) -> "Canvas":
        """A canvas with names short enough for legends."""
        return cls(study, folder, short(study.models))

    @property
    def colours(self) -> dict[str, str]:
        """Name in figures -> colour."""
        return dict(zip(self.names.values(), COLOURS * 99, strict=False))

    @property
    def pair_colours(self) -> dict[str, str]:
        """`A \u2013 B` -> colour."""
        pairs = [self.pair(a, b) for a, b in self.study.pairs() if a != b]
        start = len(self.names) % len(COLOURS)
        colours = COLOURS[start:] + COLOURS[:start]
        return dict(zip(pairs, colours * 99, strict=False))

    def pair(self, a: str, b: str) -> str:
        """Both names, for a title or a legend."""
        return f"{self.names[a]} \u2013 {self.names[b]}"

    def file(self, name: str) -> Path:
        """Where a figure is written."""
        return self.folder / f"{name}.png"

    def lines(self, name: str) -> dict[str, Reading]:
        """Name in figures -> the reading, of the models that have it."""
        return {self.names[m]: r for m, r in self.study.having(name).items()}

    def panels(self, titles: Mapping[str, str], *, percent: bool = False) -> list[Panel]:
        """A panel for each reading that some model has; one for each feature where there are two.

        Args:
            titles: name of a reading -> title of its panel.
            percent: see `Panel`.
        """
        made: list[Panel] = []
        for name, title in titles.items():
            for end, lines in by_feature(self.lines(name)).items():
                base = by_feature(self.lines(f"{name}_shuffled")).get(end, {})
                dots = self.lines(f"{name}_by_head")
                made.append(Panel(f"{title}{end}", lines, base, dots, percent))
        return made


def by_feature(readings: Named) -> dict[str, dict[str, Reading]]:
    """`, class token` and `, mean of patches` -> readings; without features, all under nothing."""
    found: dict[str, dict[str, Reading]] = {}
    for name, reading in readings.items():
        for feature in reading.axes.get("feature", ("",)):
            part = only(reading, "feature", feature) if feature else reading
            end = f", {FEATURES.get(feature, feature)}" if feature else ""
            found.setdefault(end, {})[name] = part
    return found


def only(reading: Reading, axis: str, label: str) -> Reading:
    """The part of a reading at one place of one of its axes."""
    dim, i = list(reading.axes).index(axis), reading.axes[axis].index(label)
    low, high = (None if t is None else t.select(dim, i) for t in (reading.low, reading.high))
    rest = {name: labels for name, labels in reading.axes.items() if name != axis}
    value, missing = reading.value.select(dim, i), reading.missing.select(dim, i)
    return Reading(reading.name, rest, value, reading.unit, reading.about, low, high, missing)


def caption(lead: str, titles: Mapping[str, str], known: Sequence[Named]) -> str:
    """What is drawn, then what each reading is, once.

    Args:
        lead: a sentence or two on the figure.
        titles: what the readings are called; those of one title are said once.
        known: readings by name, e.g. of every model.
    """
    abouts = {
        title: next((r[name].about for r in known if name in r and r[name].about), "")
        for name, title in titles.items()
    }
    said: dict[str, str] = {}
    for title, about in abouts.items():
        if about and about not in said.values():
            said[title] = about
    return " ".join([lead, *(f"{title}: {about.rstrip('.')}." for title, about in said.items())])
