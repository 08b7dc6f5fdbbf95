"""Figures of runs: curves, bars, grids of pictures. Each returns the path it wrote."""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from contramask.report.style import COLOURS, INK, MUTED, figure, steps_axis, title
from contramask.types import UserError

Rows = Sequence[Mapping[str, Any]]
Table = Mapping[str, Mapping[str, float]]

_DPI, _GAP = 100, 4  # of grids: pixels an inch, pixels between pictures


def curves(
    runs: Mapping[str, Rows],
    keys: Sequence[str] | None,
    path: str | Path,
    *,
    columns: int | None = None,
    smooth: int = 1,
    heading: str | None = None,
    svg: bool = False,
) -> Path:
    """A panel for each key, a line for each run, over the training step.

    Args:
        runs: rows of metrics by the run's name; each row has `step`.
        keys: what is drawn; a run without a key has no line in its panel. None: the loss, its
            terms, and all results of probes (`val/...`).
        path: PNG, JPEG or SVG.
        columns: panels in a row; None: 2, or 3 if there are more than 4.
        smooth: rows of a running mean, drawn over the values in a pale line where there are many.
        heading: of the whole figure.
        svg: write an SVG beside it.

    Raises:
        UserError: if no row has any of the keys.
    """
    known = list(dict.fromkeys(k for rows in runs.values() for row in rows for k in row))
    shown = _usual(known) if keys is None else list(keys)
    if not set(shown) & set(known):
        raise UserError(
            f"no run has any of the keys {', '.join(shown) or 'train/loss, val/...'}; there are "
            f"{', '.join(sorted(known)) or 'none'}; give others to `keys`"
        )
    columns = min(columns or (2 if len(shown) <= 4 else 3), len(shown))
    lines = math.ceil(len(shown) / columns)
    with figure(path, 3.6 * columns + 0.2, 2.4 * lines + 0.4, svg=svg) as drawn:
        panels = drawn.subplots(lines, columns, squeeze=False).ravel()
        handles: dict[str, Any] = {}
        for key, panel in zip(shown, panels, strict=False):
            handles |= _panel(panel, runs, key, smooth)
        for panel in panels[len(shown) :]:
            panel.remove()
        if len(handles) > 1:
            drawn.legend(handles.values(), handles, loc="outside lower center", ncols=4)
        title(drawn, heading)
    return Path(path)


def bars(
    table: Table,
    path: str | Path,
    *,
    ylabel: str = "accuracy, %",
    chance: float | None = None,
    spread: Table | None = None,
    muted: Collection[str] = (),
    heading: str | None = None,
    svg: bool = False,
) -> Path:
    """Groups of bars: a group for each column of the table, a bar for each row of it.

    Args:
        table: row -> column -> value; what is missing or NaN has no bar.
        path: PNG, JPEG or SVG.
        ylabel: what the values are.
        chance: a dashed line at what guessing gives.
        spread: row -> column -> half the length of an error bar, e.g. over seeds.
        muted: rows drawn in grey, such as a random initialisation.
        heading: of the figure.
        svg: write an SVG beside it.

    Raises:
        UserError: if the table is empty.
    """
    columns = list(dict.fromkeys(c for row in table.values() for c in row))
    if not columns:
        raise UserError("the table of bars is empty; give it at least one row with one value")
    wide = min(0.84 / len(table), 0.35)
    inches = 0.9 + len(columns) * (0.36 * len(table) + 0.3)
    with figure(path, max(4.2, inches), 3.3, svg=svg) as drawn:
        panel = drawn.subplots()
        colours = dict(zip([n for n in table if n not in muted], COLOURS * 9, strict=False))
        for i, (name, row) in enumerate(table.items()):
            places = [c + (i - (len(table) - 1) / 2) * wide for c in range(len(columns))]
            values = [row.get(c, math.nan) for c in columns]
            errors = [(spread or {}).get(name, {}).get(c, math.nan) for c in columns]
            colour = colours.get(name, MUTED)
            made = panel.bar(places, values, wide * 0.92, label=name, color=colour)
            if any(map(math.isfinite, errors)):
                panel.errorbar(places, values, errors, fmt="none", ecolor=INK, capsize=2)
            tops = [v + (e if math.isfinite(e) else 0) for v, e in zip(values, errors, strict=True)]
            for bar, value, top in zip(made, values, tops, strict=True):
                _value(panel, bar.get_x() + bar.get_width() / 2, top, value)
        if chance is not None:
            panel.axhline(chance, color=INK, linestyle="--", linewidth=1, label="chance")
        panel.set_xticks(range(len(columns)), columns)
        panel.tick_params(axis="x", length=0, labelsize=9)
        panel.grid(visible=False, axis="x")
        panel.margins(x=0.02, y=0.12)
        panel.set_ylabel(ylabel)
        drawn.legend(loc="outside lower center", ncols=min(len(table) + (chance is not None), 5))
        title(drawn, heading)
    return Path(path)


def image_grid(
    rows: Mapping[str, Float[Tensor, "n 3 H W"]],
    path: str | Path,
    *,
    labels: Sequence[str] = (),
    heading: str | None = None,
    zoom: float = 0.9,
) -> Path:
    """Pictures in [0, 1], a labelled row for each entry, pixel by pixel.

    Args:
        rows: label -> images; rows may differ in number and size. Values outside are clipped,
            NaN is black.
        path: PNG or JPEG.
        labels: of the columns.
        heading: of the whole.
        zoom: inches, at 100 pixels an inch, to which small pictures are enlarged, by a whole
            number.

    Raises:
        UserError: if there is no picture.
    """
    pixels = {name: _pixels(x, zoom) for name, x in rows.items() if len(x)}
    if not pixels:
        raise UserError("there are no pictures to draw; give at least one")
    left = 20 + round(7.4 * max(map(len, pixels)))  # room for the longest label
    top = 6 + 20 * bool(labels) + 24 * bool(heading)
    width = left + max(len(x) * (x.shape[2] + _GAP) for x in pixels.values()) + 4
    height = top + sum(x.shape[1] + _GAP for x in pixels.values()) + 2
    with figure(path, width / _DPI, height / _DPI) as drawn:
        drawn.set_layout_engine("none")
        drawn.set_dpi(_DPI)
        _place(drawn, pixels, left, top, labels)
        if heading:
            where = (8 / width, 1 - 6 / height)
            drawn.text(*where, heading, va="top", fontsize=10.5, fontweight="bold")
    return Path(path)


def _usual(known: Sequence[str]) -> list[str]:
    """The loss and its terms, if there are two or more, and what probes found."""
    terms = [k for k in known if k.startswith("train/loss/")]
    loss = [k for k in known if k == "train/loss"]
    found = sorted(k for k in known if k.startswith("val/"))
    return [*loss, *(terms if len(terms) > 1 else []), *found]


def _panel(panel: Axes, runs: Mapping[str, Rows], key: str, smooth: int) -> dict[str, Any]:
    """Draws a line for each run that has the key; returns them by name."""
    lines = {}
    for (name, rows), colour in zip(runs.items(), COLOURS * 9, strict=False):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if not points:
            continue
        x, y = np.array(points, dtype=float).T
        y[~np.isfinite(y)] = np.nan  # a gap, and not the end of the axis
        marker = {"marker": "o", "markersize": 3} if len(points) < 12 else {}
        if smooth > 1 and len(y) >= 10 * smooth:
            panel.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
            y = _running_mean(y, smooth)
        (lines[name],) = panel.plot(x, y, color=colour, label=name, **marker)
    panel.set_title(key)
    steps_axis(panel)
    return lines


def _running_mean(y: Float[np.ndarray, " n"], width: int) -> Float[np.ndarray, " n"]:
    """Centred; towards the ends over fewer values, as many on either side."""
    halves = [min(width // 2, i, len(y) - 1 - i) for i in range(len(y))]
    return np.array([y[i - half : i + half + 1].mean() for i, half in enumerate(halves)])


def _value(panel: Axes, x: float, y: float, value: float) -> None:
    """The value over its bar."""
    if math.isfinite(value):
        text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        panel.annotate(text, (x, y), (0, 2), textcoords="offset points", ha="center", fontsize=7)


def _pixels(images: Float[Tensor, "n 3 H W"], zoom: float) -> UInt8[np.ndarray, "n h w 3"]:
    values = images.detach().float().cpu().nan_to_num(0.0).clamp(0, 1)
    pixels = (values * 255).round().byte().permute(0, 2, 3, 1).numpy()
    times = max(1, round(zoom * _DPI / pixels.shape[1]))
    return pixels.repeat(times, 1).repeat(times, 2)


def _place(
    drawn: Figure,
    pixels: Mapping[str, UInt8[np.ndarray, "n h w 3"]],
    left: int,
    top: int,
    labels: Sequence[str],
) -> None:
    """Pictures and labels at whole pixels, so that nothing is resampled."""
    width, height = (round(n * _DPI) for n in drawn.get_size_inches())
    first = next(iter(pixels.values()))
    for i, label in enumerate(labels[: len(first)]):
        x = left + i * (first.shape[2] + _GAP) + first.shape[2] / 2
        drawn.text(x / width, 1 - (top - 4) / height, label, ha="center", va="bottom")
    bottom = height - top
    for name, row in pixels.items():
        bottom -= row.shape[1]
        y = (bottom + row.shape[1] / 2) / height
        drawn.text((left - 8) / width, y, name, ha="right", va="center")
        for i, picture in enumerate(row):
            drawn.figimage(picture, left + i * (row.shape[2] + _GAP), bottom, origin="upper")
        bottom -= _GAP
