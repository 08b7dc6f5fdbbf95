"""An image, its mask and predicted masks side by side, with a legend."""

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from numpy import ndarray
from PIL import Image, ImageDraw, ImageFont

from contramask.errors import UserError

WIDTH = 420  # pixels of one panel; narrower images are enlarged
GAP, TITLE, ROW = 10, 26, 22  # pixels between panels, above them, and of a line of the legend
VOID = (40, 40, 40)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_PAPER, _INK = (255, 255, 255), (20, 20, 20)
_GOLDEN = 0.61803398875  # hues at this distance stay apart however many there are


def palette(classes: int) -> UInt8[ndarray, "C 3"]:
    """Colours that can be told apart, the same for a class whatever their number."""
    colours = [
        colorsys.hsv_to_rgb(
            (0.58 + _GOLDEN * i) % 1.0, (0.78, 0.5, 0.95)[i % 3], (0.88, 0.97, 0.62)[i % 3]
        )
        for i in range(classes)
    ]
    return np.round(255 * np.array(colours)).astype(np.uint8)


def side_by_side(
    image: UInt8[ndarray, "H W 3"],
    masks: Mapping[str, Int[ndarray, "H W"]],
    names: Sequence[str],
) -> UInt8[ndarray, "h w 3"]:
    """The image and each mask under its title; below, the classes that occur.

    Args:
        image: RGB.
        masks: title -> labels; what is below 0 is drawn dark, as void.
        names: of the classes.
    """
    colours, font = palette(len(names)), ImageFont.load_default(14)
    height = max(1, round(WIDTH * image.shape[0] / image.shape[1]))
    panels = {"image": Image.fromarray(image).resize((WIDTH, height), Image.Resampling.LANCZOS)}
    for title, mask in masks.items():
        drawn = np.where((mask >= 0)[..., None], colours[mask], np.array(VOID, np.uint8))
        panels[title] = Image.fromarray(drawn).resize((WIDTH, height), Image.Resampling.NEAREST)
    shown = sorted({int(c) for mask in masks.values() for c in np.unique(mask) if c >= 0})
    entries = [(names[c], tuple(int(v) for v in colours[c])) for c in shown]
    if any((mask < 0).any() for mask in masks.values()):
        entries.append(("void", VOID))
    width = GAP + len(panels) * (WIDTH + GAP)
    lines = _lines(entries, width, font)
    sheet = Image.new("RGB", (width, TITLE + height + GAP + ROW * len(lines) + GAP), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, (title, panel) in enumerate(panels.items()):
        left = GAP + i * (WIDTH + GAP)
        pen.text((left, 5), title, _INK, font)
        sheet.paste(panel, (left, TITLE))
    for i, line in enumerate(lines):
        top = TITLE + height + GAP + ROW * i
        for left, name, colour in line:
            pen.rectangle((left, top + 3, left + 14, top + 17), colour, _INK)
            pen.text((left + 20, top + 2), name, _INK, font)
    return np.array(sheet)


def write_picture(pixels: UInt8[ndarray, "h w 3"], path: Path) -> None:
    """One PNG. Raises `UserError` if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, "PNG")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); set --out to a folder that can"
        ) from error


def _lines(
    entries: Sequence[tuple[str, tuple[int, ...]]], width: int, font: Font
) -> list[list[tuple[int, str, tuple[int, ...]]]]:
    """Entries of the legend broken into lines: (left, name, colour)."""
    lines: list[list[tuple[int, str, tuple[int, ...]]]] = [[]]
    left = GAP
    for name, colour in entries:
        needed = 20 + round(font.getlength(name)) + 18
        if lines[-1] and left + needed > width:
            lines.append([])
            left = GAP
        lines[-1].append((left, name, colour))
        left += needed
    return lines
