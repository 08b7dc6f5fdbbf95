"""The figures and the table of pairs: CKA maps, layers at the same depth, agreement."""

from contramask.analysis.reading import Reading
from contramask.report.canvas import Canvas, caption
from contramask.report.claims_pairs import called, different, of_pairs, pool_of, ways
from contramask.report.depth import Panel, profiles
from contramask.report.heat import Pair, cka_maps, outputs_only, same_depth_maps
from contramask.report.layers import is_output, places
from contramask.report.markup import Drawn, table, text
from contramask.report.words import Measured

POOL_NAMES = {"flat": "all tokens", "mean": "mean of patches", "cls": "class token"}
MANY = 40  # layers, from which a map of a second pooling shows block outputs only
HEADLINES = {
    "agree/top1": "same prediction",
    "agree/tau": "Kendall's tau",
    "agree/f1": "F1",
    "agree/both_correct": "both correct",
    "agree/both_incorrect": "both incorrect",
    "agree/hamming": "one correct",
    "agree/top_channels": "top channels in common",
}
SHARES = ("agree/top1", "agree/both_correct", "agree/both_incorrect", "agree/hamming")


def similarity(canvas: Canvas) -> list[Drawn]:
    """Maps of every pooling and cleaning; what is read off from them for the first pooling."""
    drawn: list[Drawn] = []
    for pool, cleanings in ways(canvas.study).items():
        small = bool(drawn)
        for cleaning in cleanings:
            drawn += _maps(canvas, pool, cleaning, small=small)
    first = pool_of(canvas.study)
    return drawn if first is None else drawn + _same_depth(canvas, first) + _profiles(canvas, first)


def pair_table(canvas: Canvas) -> str:
    """A row for each pair of two models, a column for each single number there is."""
    columns: dict[str, dict[str, Measured]] = {}
    for pool, cleanings in ways(canvas.study).items():
        for cleaning in cleanings:
            found = of_pairs(canvas.study, f"cka/{pool}/{cleaning}/same_depth_mean")
            columns[f"CKA of {_pooled(pool)}, {cleaning}"] = found
    for name, heading in HEADLINES.items():
        columns[heading] = of_pairs(canvas.study, name, share=name in SHARES)
    columns = {heading: found for heading, found in columns.items() if found}
    pairs = [called(pair) for pair in canvas.study.pairs() if pair[0] != pair[1]]
    rows = [
        [text(pair), *(cell(found.get(pair)) for found in columns.values())]
        for pair in pairs
        if any(pair in found for found in columns.values())
    ]
    return table(["pair", *map(text, columns)], rows) if rows else ""


def cell(value: Measured | None) -> str:
    """A number over its interval."""
    if value is None:
        return "\u2013"
    first, _, interval = str(value).partition("[")
    small = f'<span class="interval">[{text(interval)}</span>' if interval else ""
    return text(first.strip()) + small


def _maps(canvas: Canvas, pool: str, cleaning: str, *, small: bool) -> list[Drawn]:
    name = f"cka/{pool}/{cleaning}"
    pairs = sorted(canvas.study.pairs(), key=lambda pair: pair[0] == pair[1])
    found: dict[Pair, Reading] = {
        (a, b): reading for a, b in pairs if (reading := canvas.study.get(name, a, b)) is not None
    }
    if not found:
        return []
    crowded = small and max(max(r.value.shape) for r in found.values()) > MANY
    if crowded:
        found = {pair: outputs_only(reading) for pair, reading in found.items()}
        found = {pair: reading for pair, reading in found.items() if reading.value.numel() > 1}
    path = canvas.file(name.replace("/", "_"))
    cka_maps(found, path, canvas.names)
    lead = f"CKA of {_pooled(pool)}, {_how(cleaning)}. Grey: no value."
    if crowded:
        lead += " Outputs of whole blocks only."
    elif any("." in label for r in found.values() for label in r.axes["layer_a"]):
        lead += " A tick is the first layer of a block; after it come those inside it."
    return [Drawn(path, f"CKA of {_pooled(pool)}, {cleaning}", _caption(canvas, lead, name))]


def _pooled(pool: str) -> str:
    return POOL_NAMES.get(pool, pool)


def _how(cleaning: str) -> str:
    return {"raw": "features as they are"}.get(cleaning, f"features {cleaning}")


def _same_depth(canvas: Canvas, pool: str) -> list[Drawn]:
    """Sub-layer by block, raw beside standardised."""
    cleanings = ways(canvas.study)[pool]
    names = [f"cka/{pool}/{cleaning}/same_depth" for cleaning in cleanings]
    tables: dict[str, Reading] = {}
    for a, b in canvas.study.pairs():
        for name, cleaning in zip(names, cleanings, strict=True):
            reading = canvas.study.get(name, a, b)
            if a != b and reading is not None:
                tables[f"{canvas.pair(a, b)}\n{cleaning}"] = reading
    if not tables:
        return []
    path = same_depth_maps(tables, canvas.file(f"cka_{pool}_same_depth"))
    lead = f"CKA of {_pooled(pool)} at the same place in both models, by sub-layer and block."
    alt = f"CKA at the same depth, {_pooled(pool)}"
    return [Drawn(path, alt, _caption(canvas, lead, names[0]))]


def _profiles(canvas: Canvas, pool: str) -> list[Drawn]:
    """CKA over the distance in depth, and the block that is most alike."""
    panels: list[Panel] = []
    titles: dict[str, str] = {}
    for cleaning in ways(canvas.study)[pool]:
        for end, what in (("by_distance", "CKA by distance"), ("correspondence", "Nearest block")):
            name, title = f"cka/{pool}/{cleaning}/{end}", f"{what}, {cleaning}"
            found = {canvas.pair(*pair): r for pair, r in different(canvas.study, name).items()}
            if found and end == "correspondence":
                lines = {pair: _by_block(reading) for pair, reading in found.items()}
                panels.append(Panel(title, lines, xlabel="block of the first"))
            elif found:
                panels.append(Panel(title, found, xlabel="blocks apart"))
            titles |= {name: what} if found else {}
    if not panels:
        return []
    columns = 2 if len(panels) in (2, 4) else 3
    path = canvas.file(f"cka_{pool}_profiles")
    profiles(panels, path, canvas.pair_colours, columns=columns)
    lead = f"CKA of {_pooled(pool)} between pairs of models."
    text_of = caption(lead, titles, [canvas.study.readings[who] for who in canvas.study.pairs()])
    return [Drawn(path, f"CKA over depth, {_pooled(pool)}", text_of)]


def _by_block(reading: Reading) -> Reading:
    """Labels as numbers of blocks; of sub-layers and blocks, the blocks."""
    (labels,) = reading.axes.values()
    outputs = [i for i, label in enumerate(labels) if is_output(label)]
    kept = outputs or list(range(len(labels)))
    xs = places([labels[i] for i in kept])
    value, missing = reading.value[kept], reading.missing[kept]
    axes = {"block": tuple(f"{x:g}" for x in xs)}
    return Reading(reading.name, axes, value, "block of the second", reading.about, missing=missing)


def _caption(canvas: Canvas, lead: str, name: str) -> str:
    known = [canvas.study.readings[who] for who in canvas.study.pairs()]
    return caption(lead, {name: "CKA"}, known)
