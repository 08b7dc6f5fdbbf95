"""Accuracy under degradations: a panel for each kind, a line for each model."""

import math
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from contramask.functional.degradations import EPS, Degradation, Kind
from contramask.report.style import COLOURS, INK, MUTED, figure, title
from contramask.report.words import plain, short

# Model -> word -> top-1 accuracy, a fraction; `clean` is among the words.
Accuracies = Mapping[str, Mapping[str, float]]
Points = dict[float, float]

_COLUMNS = 3
_TITLES: dict[Kind, str] = {
    "freq": "Band-limited noise",
    "noise": "Gaussian noise",
    "blur": "Gaussian blur",
    "lowpass": "Low-pass",
    "highpass": "High-pass",
    "shuffle": "Shuffled patches",
}
_XLABELS: dict[Kind, str] = {
    "freq": "frequency, radians per pixel",
    "noise": "sigma / 255",
    "blur": "sigma, pixels",
    "lowpass": "up to, cycles per image",
    "highpass": "above, cycles per image",
    "shuffle": "patches along a side",
}
_CLEAN: dict[Kind, float] = {"noise": 0.0, "blur": 0.0, "shuffle": 1.0}  # the strength of nothing


def draw_robustness(models: Accuracies, path: str | Path, *, heading: str | None = None) -> Path:
    """Draw all degradations of models that are in the same figure.

    Of band-limited noise the drop against clean images, over its frequency, as Park et al. (2023,
    arXiv:2305.00729) show it; of all others the accuracy. A thin dashed line is the accuracy on
    clean images.

    Args:
        models: accuracies by name; a model may lack some degradations.
        path: PNG; an SVG is written beside it.
        heading: of the whole figure.
    """
    panels = _panels(models)
    assert panels, "no degradation but clean"
    names = short(models)
    colours = dict(zip(models, COLOURS * 99, strict=False))
    lines, columns = math.ceil(len(panels) / _COLUMNS), min(len(panels), _COLUMNS)
    size = (3.0 * columns + 0.3, 2.3 * lines + 0.6)
    with figure(path, *size, svg=True) as drawn:
        grid = drawn.subplots(lines, columns, squeeze=False).ravel()
        for spare in grid[len(panels) :]:
            spare.remove()
        for axes, ((kind, eps), curves) in zip(grid, panels.items(), strict=False):
            clean = {name: models[name]["clean"] for name in curves}
            _panel(axes, kind, curves, clean, colours)
            amount = f", eps {eps:g}" if kind == "freq" and eps != EPS else ""
            axes.set_title(f"{_TITLES[kind]}{amount}")
        handles = [Line2D([], [], color=colours[name], marker="o", markersize=3) for name in names]
        labels = [plain(name) for name in names.values()]
        handles.append(Line2D([], [], color=MUTED, linestyle="--", linewidth=1))
        drawn.legend(handles, [*labels, "clean images"], loc="outside lower center", ncols=4)
        title(drawn, heading)
    return Path(path)


def _panels(models: Accuracies) -> dict[tuple[Kind, float], dict[str, Points]]:
    """(kind, eps) -> model -> strength -> accuracy, in the order of `_TITLES`."""
    found: dict[tuple[Kind, float], dict[str, Points]] = {}
    for name, accuracies in models.items():
        for word, value in accuracies.items():
            made = Degradation.parse(word)
            if made.kind != "clean":
                curves = found.setdefault((made.kind, made.eps), {})
                curves.setdefault(name, {})[made.strength] = value
    order = list(_TITLES)
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1])))


def _panel(
    axes: Axes,
    kind: Kind,
    curves: Mapping[str, Points],
    clean: Mapping[str, float],
    colours: Mapping[str, str],
) -> None:
    for name, points in curves.items():
        shown = dict(points)
        if kind == "freq":
            shown = {x: clean[name] - y for x, y in points.items()}
        elif kind in _CLEAN:
            shown[_CLEAN[kind]] = clean[name]
        xs = sorted(shown)
        axes.plot(xs, [shown[x] for x in xs], "o-", color=colours[name], markersize=3)
        level = 0.0 if kind == "freq" else clean[name]
        colour = MUTED if kind == "freq" else colours[name]
        axes.axhline(level, color=colour, linestyle="--", linewidth=0.9, alpha=0.6, zorder=1)
    axes.set_xlabel(_XLABELS[kind])
    axes.set_ylabel("drop of top-1, points" if kind == "freq" else "top-1")
    percent = "" if kind == "freq" else " %"
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g}{percent}".replace("-", "\u2212"))
    if kind != "freq":
        top = max([*clean.values(), *(y for points in curves.values() for y in points.values())])
        axes.set_ylim(0.0, 1.07 * top or 1.0)
    if kind == "freq":
        axes.set_xlim(0, 1.03)
        axes.xaxis.set_major_formatter(FuncFormatter(_in_pi))
    elif kind in ("lowpass", "highpass", "shuffle"):
        ticks = sorted({x for points in curves.values() for x in points})
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(ticks + [1.0] * (kind == "shuffle")))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.tick_params(labelcolor=INK)


def _in_pi(x: float, _: object) -> str:
    if abs(x) < 1e-9:
        return "0"
    return "\u03c0" if abs(x - 1) < 1e-9 else f"{x:g}\u03c0"
