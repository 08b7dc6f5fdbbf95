"""One look for all figures. The only importer of matplotlib is this folder.

The backend is Agg: no window, no pyplot, no state that outlives a figure.
"""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

# Okabe and Ito's colours, which people with any colour vision tell apart, and two more.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B4C9A", "#8C6D31")
MUTED = "#9AA0A6"  # baselines
INK, FAINT = "#202124", "#DADCE0"
DPI = 150

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9.0,
    "text.color": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "contramask",  # the same bytes twice
    "svg.fonttype": "none",  # text stays text
}


@contextmanager
def figure(
    path: str | Path, width: float, height: float, *, svg: bool = False
) -> Generator[Figure]:
    """A figure of width x height inches in the house style, saved at `path` when done.

    Args:
        path: `.png`, `.jpg` or `.svg`; its folder is made.
        width: in inches; a figure may still change its size.
        height: likewise.
        svg: write an SVG beside it.
    """
    path = Path(path)
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever the user's own settings are
        mpl.rcParams.update(STYLE)
        drawn = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(drawn)
        yield drawn
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in dict.fromkeys([path, path.with_suffix(".svg")] if svg else [path]):
            drawn.savefig(file, dpi=drawn.dpi, **_saving(file.suffix))


def steps_axis(axes: Axes) -> None:
    """Steps of training on the x axis: 0, 50 k, 100 k."""
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_xlabel("step")


def title(drawn: Figure, text: str | None) -> None:
    """A title of the whole figure, above its left edge."""
    if text:
        drawn.suptitle(text, x=0.01, ha="left", fontsize=10.5, fontweight="bold")


def _saving(suffix: str) -> dict[str, Any]:
    """What keeps dates and versions out of the file, so that equal figures are equal files."""
    return {
        ".png": {"metadata": {"Software": None}},
        ".svg": {"metadata": {"Date": None, "Creator": None}},
    }.get(suffix, {"pil_kwargs": {"quality": 90}})
