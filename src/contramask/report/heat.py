"""Heat maps of CKA: layer by layer of a pair, and sub-layer by block at the same depth."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from contramask.analysis.reading import Reading
from contramask.report.layers import EMBEDDING, block_of, is_output, thinned
from contramask.report.style import FAINT, INK, figure, title
from contramask.report.words import plain

Pair = tuple[str, str]
_LEVELS = 64  # of colour: finer steps are not seen, and make larger files
_CELL = 0.27  # inches of a cell with a number in it


def cka_maps(
    tables: Mapping[Pair, Reading],
    path: str | Path,
    names: Mapping[str, str],
    *,
    columns: int = 3,
    heading: str | None = None,
) -> Path:
    """A map for each pair: layers of the first model upwards, of the second to the right.

    Args:
        tables: pair -> reading of {layer_a, layer_b}. Colours go from 0 to 1; unbiased estimates
            below 0 are drawn as 0. Where there is no value it is grey.
        path: PNG; an SVG is written beside it.
        names: model -> what the axes call it.
        columns: maps in a row, if there are so many.
        heading: of the whole figure.
    """
    columns = min(columns, len(tables))
    lines = math.ceil(len(tables) / columns)
    with figure(path, 2.95 * columns + 0.7, 2.85 * lines + 0.3, svg=True) as drawn:
        grid = drawn.subplots(lines, columns, squeeze=False).ravel()
        drawn_on = list(zip(tables.values(), grid, strict=False))
        shown = [_image(panel, r, origin="lower") for r, panel in drawn_on]
        for ((a, b), reading), panel in zip(tables.items(), grid, strict=False):
            panel.set_box_aspect(1)
            rows, places = reading.axes.values()
            for axis, labels, model in ((panel.yaxis, rows, a), (panel.xaxis, places, b)):
                ticks = block_ticks(labels)
                axis.set_ticks(list(ticks), list(ticks.values()))
                axis.set_label_text(f"{plain(names[model])}, block")
        for spare in grid[len(tables) :]:
            spare.remove()
        bar = drawn.colorbar(shown[0], ax=list(grid[: len(tables)]), fraction=0.03, pad=0.02)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        bar.set_label("CKA")
        title(drawn, heading)
    return Path(path)


def same_depth_maps(
    tables: Mapping[str, Reading],
    path: str | Path,
    *,
    heading: str | None = None,
) -> Path:
    """A table for each title, its numbers in colour: sub-layers downwards, blocks to the right.

    Args:
        tables: title -> reading of {sublayer, layer}, of layers at the same place in two models.
        path: PNG; an SVG is written beside it.
        heading: of the whole figure.
    """
    tables = {name: with_mean(reading) for name, reading in tables.items()}
    most = [max(len(axis) for axis in axes) for axes in _both(tables)]
    columns = min(len(tables), max(1, int(9.6 / (_CELL * most[1] + 1.1))))
    lines = math.ceil(len(tables) / columns)
    size = (columns * (_CELL * most[1] + 1.1) + 0.2, lines * (0.21 * most[0] + 1.05) + 0.3)
    with figure(path, max(size[0], 4.4), size[1], svg=True) as drawn:
        grid = drawn.subplots(lines, columns, squeeze=False).ravel()
        for (heading_of, reading), panel in zip(tables.items(), grid, strict=False):
            _image(panel, reading)
            panel.tick_params(length=0)
            rows, blocks = reading.axes.values()
            panel.set_yticks(range(len(rows)), rows)
            panel.set_xticks(range(len(blocks)), [_block(label) for label in blocks])
            panel.set_xlabel("block")
            panel.set_title(plain(heading_of))
            panel.spines[:].set_visible(False)
            _numbers(panel, _values(reading))
        for spare in grid[len(tables) :]:
            spare.remove()
        title(drawn, heading)
    return Path(path)


def block_ticks(labels: Sequence[str], most: int = 7) -> dict[float, str]:
    """Place of the first layer of a block -> its number, at most `most` of them.

    Block outputs alone have their number at themselves.
    """
    first: dict[int | str, int] = {}
    for i, label in enumerate(labels):
        block = "emb" if label == EMBEDDING else block_of(label)
        if block is not None:
            first.setdefault(block, i)
    crowded = len(labels) > 9  # `emb` and `0` side by side would touch
    ticks = {float(i): str(block) for block, i in first.items() if not crowded or block != "emb"}
    return thinned(ticks, most)


def outputs_only(reading: Reading) -> Reading:
    """The part of a map that has embedding, block outputs and final features: no sub-layers."""
    kept = [
        [i for i, label in enumerate(axis) if is_output(label) or block_of(label) is None]
        for axis in reading.axes.values()
    ]
    axes = {
        name: tuple(axis[i] for i in keep)
        for (name, axis), keep in zip(reading.axes.items(), kept, strict=True)
    }
    place = np.ix_(*kept)
    value, missing = reading.value[place], reading.missing[place]
    return Reading(reading.name, axes, value, reading.unit, reading.about, missing=missing)


def with_mean(reading: Reading) -> Reading:
    """A table with a further column: the mean over its blocks."""
    over = reading.mean("layer")
    axes = {**reading.axes, "layer": (*reading.axes["layer"], "mean")}
    value = torch.cat([reading.value, over.value[:, None]], 1)
    missing = torch.cat([reading.missing, over.missing[:, None]], 1)
    return Reading(reading.name, axes, value, reading.unit, reading.about, missing=missing)


def _both(tables: Mapping[str, Reading]) -> list[list[tuple[str, ...]]]:
    axes = [tuple(reading.axes.values()) for reading in tables.values()]
    return [[pair[0] for pair in axes], [pair[1] for pair in axes]]


def _block(label: str) -> str:
    block = block_of(label)
    return label if block is None else str(block)


def _numbers(panel: Axes, values: Float[np.ndarray, "r c"]) -> None:
    """Two digits in each cell, white on the dark colours."""
    for row, column in itertools.product(*map(range, values.shape)):
        value = values[row, column]
        if np.isfinite(value):
            text = f"{value:.2f}".replace("0.", ".", 1)
            colour = "white" if value < 0.6 else INK
            panel.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)


def _values(reading: Reading) -> Float[np.ndarray, "..."]:
    return np.where(reading.missing.numpy(), np.nan, reading.value.numpy())


def _image(
    panel: Axes, reading: Reading, *, origin: Literal["lower", "upper"] = "upper"
) -> AxesImage:
    """One square a value; the SVG keeps these squares as they are and enlarges them when shown."""
    colours = mpl.colormaps["viridis"].resampled(_LEVELS).with_extremes(bad=FAINT)
    panel.grid(visible=False)
    return panel.imshow(
        _values(reading), cmap=colours, vmin=0, vmax=1, origin=origin, aspect="auto",
        interpolation="none",
    )  # fmt: skip
