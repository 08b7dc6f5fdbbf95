"""Figures of one analysis during training: curves over depth, maps of CKA."""

from collections.abc import Mapping
from pathlib import Path

from contramask.analysis.reading import Reading
from contramask.report.depth import Panel, over_depth
from contramask.report.heat import cka_maps
from contramask.report.style import COLOURS

NOW = "now"
TITLES = {
    "attn/distance": "Attention distance, px",
    "attn/entropy": "Entropy of attention, nats",
    "attn/nmi": "Mutual information",
    "attn/diversity": "Diversity of maps",
    "fourier/high": "Log amplitude, highest frequency",
    "repr/variance_top10": "Variance in top 10 channels",
}
FEATURES = {
    "repr/effective_rank": "Effective rank",
    "class/knn": "k-NN accuracy",
    "class/ridge": "Ridge accuracy",
}
MAP = "/map"


def draw(readings: Mapping[str, Reading], folder: Path, step: int) -> dict[str, Path]:
    """Write `depth-step-00001000.png` and `cka-step-00001000.png`; what there is nothing for, not.

    Returns:
        Key in W&B -> file.
    """
    written: dict[str, Path] = {}
    panels = [Panel(text, {NOW: readings[n]}) for n, text in TITLES.items() if n in readings]
    for name, text in FEATURES.items():
        if name in readings:
            reading = readings[name]
            panels.append(Panel(text, {f: _of(reading, f) for f in reading.axes["feature"]}))
    past = _past(readings)
    if past:
        panels.append(Panel("CKA with", past))
    if panels:
        names = dict.fromkeys(line for panel in panels for line in panel.lines)
        colours = dict(zip(names, COLOURS * len(names), strict=False))
        path = folder / f"depth-step-{step:08d}.png"
        written["analysis/depth"] = over_depth(panels, path, colours, heading=f"Step {step}")
    maps = {(n.split("/")[1], NOW): r for n, r in readings.items() if n.endswith(MAP)}
    if maps:
        names = {name: name for pair in maps for name in pair}
        turned = {(NOW, other): r for (other, _), r in maps.items()}
        path = folder / f"cka-step-{step:08d}.png"
        written["cka/map"] = cka_maps(turned, path, names, heading=f"Step {step}")
    return written


def _past(readings: Mapping[str, Reading]) -> dict[str, Reading]:
    """What the network is compared with -> CKA by depth."""
    named = {n.removesuffix(MAP): n for n in readings if n.endswith(MAP)}
    return {n.removeprefix("cka/"): readings[n] for n in named if n in readings}


def _of(reading: Reading, feature: str) -> Reading:
    """One feature's line."""
    i = reading.axes["feature"].index(feature)
    return Reading(
        reading.name,
        {"layer": reading.axes["layer"]},
        reading.value[i],
        reading.unit,
        reading.about,
        missing=reading.missing[i],
    )
