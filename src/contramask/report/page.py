"""The report of a study: one page with all in it, and its figures as files beside it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from contramask.analysis.study import Study
from contramask.report import markup, sections, sections_pairs
from contramask.report.canvas import Canvas
from contramask.report.claims import in_last_block
from contramask.report.claims_classes import FEATURES, final
from contramask.report.findings import caveats, findings
from contramask.report.markup import Drawn, text
from contramask.report.words import Measured, at, number

SECTIONS: dict[str, Callable[[Canvas], list[Drawn]]] = {
    "Classes by depth": sections.classes,
    "Attention": sections.attention,
    "Frequencies": sections.frequencies,
    "Representation": sections.representation,
    "Invariance": sections.invariance,
    "Similarity of models": sections_pairs.similarity,
}
# heading -> reading, and its place
NUMBERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "RankMe": ("repr/rankme", ()),
    "LiDAR, class token": ("repr/lidar", ("cls",)),
    "LiDAR, mean of patches": ("repr/lidar", ("mean",)),
    "top channels shared with other data": ("repr/top_channels_overlap", ()),
}
LAST_BLOCK = {
    "attn/distance": "attention distance",
    "attn/nmi": "mutual information",
    "fourier/high": "highest frequency",
    "repr/variance_top10": "variance in top 10 channels",
}


def write_report(study: Study, folder: Path) -> Path:
    """Writes `report.html`, which needs nothing else, and `figures/` with PNGs and SVGs.

    A section is left out where no model has its readings. The page has no script and loads
    nothing.

    Args:
        study: what was found, with its pictures; nothing else is read.
        folder: made if it is not there; what an earlier report left under the same names is
            written over.

    Returns:
        The path of the page.
    """
    canvas = Canvas.of(study, folder / "figures")
    parts = [
        ("findings", "What this says", _findings(study)),
        ("summary", "Summary", _summary(canvas)),
    ]
    for heading, draw in SECTIONS.items():
        name = heading.split(maxsplit=1)[0].lower()
        body = "".join(map(_figure, draw(canvas)))
        if draw is sections_pairs.similarity:
            body = sections_pairs.pair_table(canvas) + body
        parts.append((name, heading, body))
    parts.append(("notes", "Notes", _notes(study)))
    parts.append(("material", "Models and images", _models(canvas) + _data(study.data)))
    parts = [part for part in parts if part[2]]
    links = " ".join(f'<a href="#{name}">{text(heading)}</a>' for name, heading, _ in parts)
    body = f"{_header(study)}<nav>{links}</nav>"
    body += "".join(markup.section(name, heading, [inner]) for name, heading, inner in parts)
    folder.mkdir(parents=True, exist_ok=True)
    path, part = folder / "report.html", folder / "report.part"
    part.write_text(markup.page(_title(study), body), "utf-8")
    part.replace(path)
    return path


def _figure(drawn: Drawn) -> str:
    if not drawn.photo:
        markup.to_palette(drawn.path)
    return markup.figure(drawn)


def _title(study: Study) -> str:
    names = list(study.models)
    if len(names) > 4:
        return f"{len(names)} Vision Transformers compared"
    return ", ".join(names) if len(names) != 2 else " and ".join(names)


def _header(study: Study) -> str:
    """What was compared on what, in a sentence."""
    count = len(study.models)
    what = "One model" if count == 1 else f"{count} models"
    images = study.data.get("images")
    on = f" on {images:,} images" if isinstance(images, int) else ""
    size = study.data.get("size")
    on += f" of {size} pixels" if size else ""
    shards = study.data.get("shards")
    on += f" from {shards}" if shards else ""
    lead = f"{what}, frozen,{on}." if on else f"{what}, frozen."
    return f'<h1>{text(_title(study))}</h1><p class="lead">{text(lead)}</p>'


def _findings(study: Study) -> str:
    items = []
    for finding in findings(study):
        reported = f"{finding.reported} ({finding.source})" if finding.reported else ""
        numbers = finding.numbers if finding.text else ""
        small = ("numbers", numbers), ("reported", reported)
        after = "".join(f'<p class="{name}">{text(said)}</p>' for name, said in small if said)
        first = f"<strong>{text(finding.topic)}.</strong> {text(finding.text or finding.numbers)}"
        items.append(f"<li><p>{first}</p>{after}</li>")
    if not items:
        return ""
    said = " ".join(caveats(study))
    end = f'<p class="reported">{text(said)}</p>' if said else ""
    return f'<ul class="findings">{"".join(items)}</ul>{end}'


def _summary(canvas: Canvas) -> str:
    """A row for each model, a column for each headline number that any has."""
    study = canvas.study
    columns: dict[str, dict[str, Measured]] = {}
    for name, heading in (("class/knn", "k-NN"), ("class/ridge", "ridge")):
        known = {m: final(study, name, m) for m in study.models}
        for feature, what in FEATURES.items():
            columns[f"{heading}, {what}"] = {
                m: v[feature] for m, v in known.items() if feature in v
            }
    for heading, (name, labels) in NUMBERS.items():
        found = {m: at(r, *labels) for m, r in study.having(name).items()}
        columns[heading] = {m: v for m, v in found.items() if v is not None}
    for name, heading in LAST_BLOCK.items():
        columns[heading] = in_last_block(study, name, share=name == "repr/variance_top10")
    columns = {heading: found for heading, found in columns.items() if found}
    rows = [
        [_name(canvas, m), *(sections_pairs.cell(found.get(m)) for found in columns.values())]
        for m in study.models
    ]
    note = (
        "Accuracies, RankMe and LiDAR are of final features, the others of the last block. "
        "In brackets 95 % intervals over images."
    )
    return markup.table(["model", *map(text, columns)], rows, note) if columns else ""


def _name(canvas: Canvas, model: str) -> str:
    """With the colour that it has in all figures."""
    colour = canvas.colours[canvas.names[model]]
    return f'<span class="swatch" style="background:{colour}"></span>{text(model)}'


def _notes(study: Study) -> str:
    items = "".join(f"<li>{text(note)}</li>" for note in study.notes)
    return f"<ul>{items}</ul>" if items else ""


def _models(canvas: Canvas) -> str:
    """A column for each model, since paths and hashes are long and models are few."""
    known = canvas.study.models
    keys = dict.fromkeys(key for about in known.values() for key in about)
    rows = [
        [text(key), *(text(_plain(key, about.get(key))) for about in known.values())]
        for key in keys
    ]
    return markup.table(["", *(_name(canvas, m) for m in known)], rows)


def _data(data: Mapping[str, Any]) -> str:
    """All that is known of the images."""
    items = "".join(f"<dt>{text(k)}</dt><dd>{text(_plain(k, v))}</dd>" for k, v in data.items())
    return f"<dl>{items}</dl>" if items else ""


def _plain(key: str, value: Any) -> str:
    """A hash by its beginning, 21.6 M parameters, 14 \u00d7 14 patches."""
    if value is None:
        return "\u2013"
    if key == "sha256":
        return str(value)[:12]
    if key == "parameters" and isinstance(value, int) and value >= 1_000_000:
        return f"{number(value / 1e6)} M"
    if key == "grid" and isinstance(value, list | tuple):
        return " \u00d7 ".join(map(str, value))
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
