"""HTML without a template engine: text is escaped here, and figures become part of the page."""

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from contramask.report.style import DPI

_COLOURS = 128  # of a figure that is no photo: lines, their bands, and the greys of letters
# Verdana is as wide as DejaVu Sans, letter by letter, and is where that is not.
_FONT = re.compile(r"'DejaVu Sans'")
_FONTS = "'DejaVu Sans', Verdana, sans-serif"
_CSS_DPI = 96


@dataclass(frozen=True)
class Drawn:
    """A figure of the report.

    Attributes:
        path: its PNG; an SVG of the same name may lie beside it.
        alt: what it is, in a few words.
        caption: what is drawn and where its definition comes from; plain text.
        photo: whether it shows pictures, which are smaller as a JPEG.
    """

    path: Path
    alt: str
    caption: str
    photo: bool = False


def text(value: object) -> str:
    """Escaped: `<` of a model's name is not the beginning of a tag."""
    return html.escape(str(value))


def figure(drawn: Drawn) -> str:
    """A figure with its caption, all in the page."""
    with Image.open(drawn.path) as picture:
        dpi = picture.info.get("dpi", (DPI, DPI))[0]
        width, height = (round(n * _CSS_DPI / dpi) for n in picture.size)
    return (
        f'<figure><img src="{data_uri(drawn.path, photo=drawn.photo)}" alt="{text(drawn.alt)}" '
        f'width="{width}" height="{height}"><figcaption>{text(drawn.caption)}</figcaption></figure>'
    )


def to_palette(path: Path) -> None:
    """Writes a PNG again with 128 colours: a third of the size, and nothing seen is lost."""
    with Image.open(path) as picture:
        dpi = picture.info.get("dpi", (DPI, DPI))
        how = Image.Quantize.MAXCOVERAGE  # rare colours count as much as common ones
        few = picture.convert("RGB").quantize(_COLOURS, how, dither=Image.Dither.NONE)
    few.save(path, optimize=True, dpi=dpi)


def data_uri(path: Path, *, photo: bool = False) -> str:
    """The smallest of what shows a figure as it is: PNG, SVG, or JPEG for photos."""
    kinds = {"image/png": path.read_bytes()}
    svg = path.with_suffix(".svg")
    if photo:
        kinds["image/jpeg"] = _jpeg(path)
    elif svg.exists():
        kinds["image/svg+xml"] = _FONT.sub(_FONTS, svg.read_text("utf-8")).encode()
    kind = min(kinds, key=lambda name: len(kinds[name]))
    return f"data:{kind};base64,{base64.b64encode(kinds[kind]).decode()}"


def _jpeg(path: Path) -> bytes:
    target = io.BytesIO()
    with Image.open(path) as picture:
        picture.convert("RGB").save(target, "JPEG", quality=88, subsampling=0)
    return target.getvalue()


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """A table that scrolls inside its box; cells are HTML already. The first column names rows."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    note = f"<caption>{caption}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table>{note}<thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def section(name: str, heading: str, parts: Iterable[str]) -> str:
    """A part of the page under a heading that can be linked to."""
    return f'<section id="{name}"><h2>{text(heading)}</h2>{"".join(parts)}</section>'


def page(title: str, body: str) -> str:
    """The whole document."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #fff; color: #202124;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", Verdana, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem; padding-top: .75rem;
  border-top: 1px solid #dadce0; }
p, li, dd, figcaption, caption { overflow-wrap: anywhere; }
nav { margin: 1rem 0 0; font-size: .9rem; }
nav a { display: inline-block; margin-right: .75rem; }
a { color: #0b57a4; }
.lead, figcaption, caption, .reported, .interval, footer { color: #50555b; }
.findings { padding: 0; list-style: none; }
.findings li { margin: 0 0 1rem; padding-left: .9rem; border-left: 3px solid #dadce0; }
.findings p { margin: 0; }
.numbers, .reported { font-size: .875rem; }
.numbers { font-variant-numeric: tabular-nums; }
.reported { font-style: italic; }
figure { margin: 1.5rem 0; break-inside: avoid; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { font-size: .875rem; margin-top: .5rem; max-width: 52rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .35rem; }
th, td { padding: .35rem .75rem .35rem 0; text-align: right; vertical-align: top;
  border-bottom: 1px solid #dadce0; }
thead th { font-weight: 600; vertical-align: bottom; min-width: 4rem; max-width: 14rem;
  overflow-wrap: break-word; }
td { max-width: 14rem; overflow-wrap: anywhere; }
th:first-child { text-align: left; }
tbody th { font-weight: 600; min-width: 7rem; max-width: 16rem; overflow-wrap: anywhere; }
.interval { display: block; font-size: .8em; white-space: nowrap; }
.swatch { display: inline-block; width: .7em; height: .7em; margin-right: .45em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .875rem; }
dt { color: #50555b; }
dd { margin: 0; }
@media print {
  main { max-width: none; padding: 0; }
  nav { display: none; }
  body { font-size: 10pt; }
  h2 { break-after: avoid; }
  .scroll { overflow: visible; }
  .findings li { break-inside: avoid; }
}
"""
