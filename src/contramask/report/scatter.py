"""Tokens in the plane, coloured by the class of their image, and pictures of attention."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba_array
from PIL import Image
from torch import Tensor

from contramask.report.figures import image_grid
from contramask.report.layers import spoken
from contramask.report.style import COLOURS, figure, title
from contramask.report.words import plain

Points = Mapping[str, Mapping[str, Float[np.ndarray, "_ 3"]]]
Pictures = Mapping[str, Mapping[str, UInt8[np.ndarray, "_ _ 3"]]]

_MOST_POINTS, _MOST_LAYERS, _MOST_IMAGES = 1500, 4, 6
_SIDE = 96  # pixels of a picture in a grid


def tokens(points: Points, path: str | Path, *, heading: str | None = None) -> Path:
    """A row for each model, a panel for each of up to four layers; one layer each: a row of models.

    Args:
        points: model -> layer -> x, y and class of each token. Of more than 1,500 tokens every
            second, third, ... is drawn. Axes have no meaning and no ticks.
        path: PNG; an SVG with the points as a picture is written beside it.
        heading: of the whole figure.
    """
    chosen = [[(model, x) for x in _spread(list(layers))] for model, layers in points.items()]
    if all(len(row) == 1 for row in chosen):
        flat = [row[0] for row in chosen]
        chosen = [flat[i : i + _MOST_LAYERS] for i in range(0, len(flat), _MOST_LAYERS)]
    columns = max(map(len, chosen))
    size = (2.3 * columns + 0.4, 2.3 * len(chosen) + 0.35 * bool(heading))
    classes = np.unique(np.concatenate([p[:, 2] for m in points.values() for p in m.values()]))
    colours = _colours(len(classes))
    with figure(path, max(size[0], 4.4), size[1], svg=True) as drawn:
        grid = drawn.subplots(len(chosen), columns, squeeze=False)
        for shown, row in zip(chosen, grid, strict=True):
            for (model, layer), panel in zip(shown, row, strict=False):
                _cloud(panel, points[model][layer], classes, colours)
                panel.set_title(f"{plain(model)}\n{spoken(layer)}", fontsize=8.5)
            for spare in row[len(shown) :]:
                spare.remove()
        title(drawn, heading)
    return Path(path)


def attention_pictures(pictures: Pictures, path: str | Path) -> Path:
    """The images in the first row; below, for each model and layer, where it attends in them.

    Args:
        pictures: model -> `image_0` and `image_0/attention_block_11` -> 8-bit picture. All models
            saw the same images; up to six are drawn.
        path: PNG.
    """
    images = [name for name in _names(pictures) if "/" not in name][:_MOST_IMAGES]
    rows: dict[str, Float[Tensor, "_ 3 _ _"]] = {"image": _row(pictures, images, "")}
    for model, known in pictures.items():
        kinds = dict.fromkeys(name.partition("/")[2] for name in known if "/" in name)
        for kind in kinds:
            seen = spoken(kind.removeprefix("attention_"))
            rows[f"{plain(model)}, {seen}"] = _row({model: known}, images, kind)
    return image_grid(rows, path, zoom=_SIDE / 100)


def _names(pictures: Pictures) -> list[str]:
    return list(dict.fromkeys(name for known in pictures.values() for name in known))


def _row(pictures: Pictures, images: Sequence[str], kind: str) -> Float[Tensor, "_ 3 _ _"]:
    """The pictures of one kind, of the first model that has each; white where none has."""
    found: list[Float[Tensor, "3 H W"]] = []
    for image in images:
        name = f"{image}/{kind}".rstrip("/")
        known = [p[name] for p in pictures.values() if name in p]
        picture = known[0] if known else np.full((_SIDE, _SIDE, 3), 255, np.uint8)
        found.append(torch.from_numpy(_resized(picture)).permute(2, 0, 1) / 255)
    return torch.stack(found)


def _resized(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """To one size: small ones keep their pixels, large ones are averaged."""
    small = max(picture.shape[:2]) <= _SIDE
    how = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return np.array(Image.fromarray(picture).resize((_SIDE, _SIDE), how))


def _cloud(
    panel: Axes,
    points: Float[np.ndarray, "n 3"],
    classes: Float[np.ndarray, " k"],
    colours: Float[np.ndarray, "k 4"],
) -> None:
    shown = points[:: -(-len(points) // _MOST_POINTS)]
    colour = colours[np.searchsorted(classes, shown[:, 2])]
    panel.scatter(shown[:, 0], shown[:, 1], s=3, color=colour, linewidth=0, rasterized=True)
    panel.set_xticks([])
    panel.set_yticks([])
    panel.set_box_aspect(1)
    panel.spines[:].set_visible(True)


def _colours(count: int) -> Float[np.ndarray, "k 4"]:
    if count <= len(COLOURS):
        return to_rgba_array(COLOURS[:count])
    return np.asarray(mpl.colormaps["turbo"](np.linspace(0.03, 0.97, count)), dtype=float)


def _spread(layers: Sequence[str]) -> list[str]:
    """Up to four of them, evenly, with the first and the last."""
    kept = np.unique(np.linspace(0, len(layers) - 1, _MOST_LAYERS).round().astype(int))
    return [layers[int(i)] for i in kept]
