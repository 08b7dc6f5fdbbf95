"""Curves over depth, a line for each model, with 95 % bands; profiles such as spectra."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from contramask.analysis.reading import Reading
from contramask.report.layers import FINAL, layer_axis, places
from contramask.report.style import MUTED, figure, title
from contramask.report.words import plain

Lines = Mapping[str, Reading]

_MOST_POINTS = 120  # of a profile: more cannot be told apart, and make large SVGs
_WIDE = {1: 5.4, 2: 4.3}  # inches of a panel, by how many are in a row
_SIDE = 3.1


@dataclass(frozen=True)
class Panel:
    """One axes: readings of the same name, a line for each model.

    Attributes:
        title: over the panel.
        lines: model -> reading of one axis: layers, or numbers such as frequencies.
        baseline: model -> reading of the same axis, drawn dashed.
        dots: model -> reading of two axes, {layer, head}: small points behind the line.
        percent: values in [0, 1] are shown as percentages.
        xlabel: for profiles; over depth it is the block.
        log: which axes are logarithmic: "", "x", "y" or "xy".
    """

    title: str
    lines: Lines
    baseline: Lines = field(default_factory=dict)
    dots: Lines = field(default_factory=dict)
    percent: bool = False
    xlabel: str = ""
    log: str = ""


def over_depth(
    panels: Sequence[Panel],
    path: str | Path,
    colours: Mapping[str, str],
    *,
    columns: int = 3,
    heading: str | None = None,
    baseline: str = "baseline",
) -> Path:
    """A panel for each quantity over the blocks. Final features are a diamond after the last block.

    Args:
        panels: what is drawn; a model may be in some of them only, and have another depth.
        path: PNG; an SVG is written beside it.
        colours: name of a line -> its colour; also the order of the legend.
        columns: panels in a row, if there are so many.
        heading: of the whole figure.
        baseline: what the legend calls the dashed lines.
    """
    return _draw(panels, path, colours, _depth_panel, columns, heading, baseline)


def profiles(
    panels: Sequence[Panel],
    path: str | Path,
    colours: Mapping[str, str],
    *,
    columns: int = 3,
    heading: str | None = None,
) -> Path:
    """A panel for each quantity over an axis of numbers, e.g. a frequency; else as `over_depth`."""
    return _draw(panels, path, colours, _profile_panel, columns, heading, "baseline")


def fans(
    models: Lines,
    path: str | Path,
    *,
    xlabel: str,
    ylabel: str = "",
    log: str = "",
    columns: int = 3,
    heading: str | None = None,
) -> Path:
    """A panel for each model with a line for each layer, coloured from the first to the last.

    Args:
        models: model -> reading of {layer, numbers}; all panels have the same scale.
        path: PNG; an SVG is written beside it.
        xlabel: what the numbers are.
        ylabel: what the values are.
        log: which axes are logarithmic.
        columns: panels in a row, if there are so many.
        heading: of the whole figure.
    """
    with figure(path, *_size(len(models), columns, 0.35), svg=True) as drawn:
        axes = _axes(drawn, len(models), columns, sharey=True)
        colours = mpl.colormaps["viridis"]
        for (name, reading), panel in zip(models.items(), axes, strict=True):
            layers, xs = reading.axes.values()
            for i, row in enumerate(_values(reading)):
                colour = colours(0.92 * i / max(1, len(layers) - 1))
                panel.plot(*_thin(_numbers(xs), row, log), color=colour, linewidth=1.1)
            panel.set_title(plain(name))
            panel.set_xlabel(xlabel)
            _scale(panel, log)
        for panel in axes[:: min(columns, len(axes))]:
            panel.set_ylabel(ylabel)
        shown = ScalarMappable(cmap=ListedColormap(colours(np.linspace(0, 0.92, 64))))
        bar = drawn.colorbar(shown, ax=list(axes), ticks=[0, 1], fraction=0.03, pad=0.02)
        bar.ax.set_yticklabels(["first\nlayer", "last\nlayer"])
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        title(drawn, heading)
    return Path(path)


def _draw(
    panels: Sequence[Panel],
    path: str | Path,
    colours: Mapping[str, str],
    draw: Any,
    columns: int,
    heading: str | None,
    baseline: str,
) -> Path:
    with figure(path, *_size(len(panels), columns, 0.3), svg=True) as drawn:
        for panel, axes in zip(panels, _axes(drawn, len(panels), columns), strict=True):
            draw(axes, panel, colours)
            axes.set_title(panel.title)
            unit = next((r.unit for r in panel.lines.values()), "")
            axes.set_ylabel("" if panel.percent else unit)
            if panel.percent:
                axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            _scale(axes, panel.log)
        shown = [name for name in colours if any(name in p.lines for p in panels)]
        handles = [Line2D([], [], color=colours[name]) for name in shown]
        labels = [plain(name) for name in shown]
        if any(p.baseline for p in panels):
            handles.append(Line2D([], [], color=MUTED, linestyle="--", linewidth=1.1))
            labels.append(baseline)
        if len(handles) > 1:
            drawn.legend(handles, labels, loc="outside lower center", ncols=3)
        title(drawn, heading)
    return Path(path)


def _size(count: int, columns: int, extra: float) -> tuple[float, float]:
    """Inches of a figure of so many panels."""
    lines = math.ceil(count / columns)
    columns = min(count, columns)
    return columns * _WIDE.get(columns, _SIDE) + 0.2, 2.35 * lines + 0.25 + extra


def _axes(drawn: Figure, count: int, columns: int, *, sharey: bool = False) -> list[Axes]:
    columns = min(count, columns)
    grid = drawn.subplots(math.ceil(count / columns), columns, squeeze=False, sharey=sharey)
    for spare in grid.ravel()[count:]:
        spare.remove()
    return list(grid.ravel()[:count])


def _depth_panel(axes: Axes, panel: Panel, colours: Mapping[str, str]) -> None:
    drawn = [name for name in colours if name in panel.dots]
    for name, reading in panel.dots.items():
        xs = np.array(places(reading.axes["layer"]))
        beside = 0.14 * (drawn.index(name) - (len(drawn) - 1) / 2)
        for head in _values(reading).T:
            axes.plot(xs + beside, head, ".", color=colours[name], alpha=0.3, markersize=2.5)
    for name, reading in panel.baseline.items():
        _line(axes, reading, colours[name], dashed=True)
    for name, reading in panel.lines.items():
        _line(axes, reading, colours[name])
    layer_axis(axes)


def _line(axes: Axes, reading: Reading, colour: str, *, dashed: bool = False) -> None:
    """A line over the blocks with its band, and a diamond for the final features."""
    (labels,) = reading.axes.values()
    xs, ys = np.array(places(labels)), _values(reading)
    body = np.array([label != FINAL for label in labels])
    style = {"linestyle": "--", "linewidth": 1.1, "alpha": 0.75} if dashed else {}
    marker = {} if dashed or len(labels) > 30 else {"marker": "o", "markersize": 2.8}
    axes.plot(xs[body], ys[body], color=colour, **style, **marker)
    axes.plot(xs[~body], ys[~body], "D", color=colour, markersize=4, alpha=0.5 if dashed else 1)
    if reading.low is not None and reading.high is not None:
        low, high = (_values(reading, t.numpy()) for t in (reading.low, reading.high))
        if not dashed:
            axes.fill_between(
                xs[body], low[body], high[body], color=colour, alpha=0.18, linewidth=0
            )
        axes.vlines(xs[~body], low[~body], high[~body], color=colour, linewidth=1)


def _profile_panel(axes: Axes, panel: Panel, colours: Mapping[str, str]) -> None:
    for name, reading in panel.lines.items():
        (labels,) = reading.axes.values()
        xs, ys = _numbers(labels), _values(reading)
        axes.locator_params(axis="x", integer=all(x.is_integer() for x in xs))
        style = {"marker": "o", "markersize": 2.8} if len(xs) <= 30 else {}
        axes.plot(*_thin(xs, ys, panel.log), color=colours[name], **style)
        if reading.low is not None and reading.high is not None:
            low, high = (_values(reading, t.numpy()) for t in (reading.low, reading.high))
            axes.fill_between(xs, low, high, color=colours[name], alpha=0.18, linewidth=0)
    axes.set_xlabel(panel.xlabel)


def _values(
    reading: Reading, table: Float[np.ndarray, "..."] | None = None
) -> Float[np.ndarray, "..."]:
    """Values as drawn: NaN, which is a gap, where there are none."""
    return np.where(reading.missing.numpy(), np.nan, reading.value if table is None else table)


def _numbers(labels: Sequence[str]) -> Float[np.ndarray, " n"]:
    return np.array([float(label) for label in labels])


def _thin(
    xs: Float[np.ndarray, " n"], ys: Float[np.ndarray, " n"], log: str
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """At most `_MOST_POINTS` points, first and last among them, spread as they are seen."""
    if len(xs) <= _MOST_POINTS:
        return xs, ys
    spread = np.geomspace if "x" in log else np.linspace
    kept = np.unique(np.round(spread(1, len(xs), _MOST_POINTS)).astype(int)) - 1
    return xs[kept], ys[kept]


def _scale(axes: Axes, log: str) -> None:
    short = FuncFormatter(lambda value, _: f"{value:g}")
    if "x" in log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(short)
    if "y" in log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(short)
        axes.yaxis.set_minor_formatter(NullFormatter())
