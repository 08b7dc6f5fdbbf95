"""The result of `contramask probe robustness`: one of both halves, its tables and its figure."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from contramask.report.robustness import draw_robustness
from contramask.types import UserError

# The name of a model, and its accuracy by word.
Named = tuple[str, dict[str, float]]


def joined(about: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One result of both halves."""
    whole: dict[str, Any] = {**about, "values": {}}
    for each in found:
        whole["values"] |= each["values"]
        whole |= {name: each[name] for name in each if name not in ("values", "protocol")}
    return {**whole, "protocol": "; ".join(each["protocol"] for each in found)}


def accuracies_of(path: Path) -> Named:
    """The run and the accuracies of an earlier result. Raises `UserError` for another file."""
    try:
        result = json.loads(path.read_text("utf-8"))
        return str(result["run"]), {row["word"]: row["top1"] for row in result["degradations"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--beside: {path} is no result of `contramask probe robustness` with degradations "
            f"({type(error).__name__}: {error}); give the JSON files it wrote"
        ) from error


def draw(result: Mapping[str, Any], beside: Sequence[Named], out: Path) -> None:
    """The figure of a result and others, beside the JSON, if there is anything but `clean`."""
    table = result.get("degradations", [])
    if len(table) < 2:
        return
    models: dict[str, dict[str, float]] = {}
    for run, accuracies in ((result["run"], {r["word"]: r["top1"] for r in table}), *beside):
        name = Path(run).name
        if name in models:  # runs of one name in several folders
            name = run if run not in models else f"{run} ({len(models) + 1})"
        models[name] = accuracies
    path = draw_robustness(models, out.with_suffix(".png"), heading="Robustness of a linear probe")
    Console().print(f"figure in {path}", highlight=False, markup=False, soft_wrap=True)


def show_tables(result: Mapping[str, Any]) -> None:
    """What degradations cost, and what is read of both cues in every split."""
    if "degradations" in result:
        Console().print(_degradations(result["degradations"]))
    if "cues" in result:
        Console().print(_cues(result["cues"]["splits"]))


def others(result: Mapping[str, Any]) -> dict[str, Any]:
    """The values that no table shows."""
    words = tuple(f"{row['word']}_" for row in result.get("degradations", ()))
    return {name: v for name, v in result["values"].items() if not name.startswith(words)}


def _degradations(rows: Sequence[Mapping[str, Any]]) -> Table:
    tops = [name for name in rows[0] if name.endswith("top1")]
    table = Table(title="degraded val images", title_justify="left")
    for name in ("degradation", *tops, "lost of clean"):
        table.add_column(name, justify="left" if name == "degradation" else "right")
    for row in rows:
        drop = row["relative_drop"]
        lost = "" if drop is None else f"{100 * drop:.1f} %"
        table.add_row(row["word"], *(f"{100 * row[name]:.2f} %" for name in tops), lost)
    return table


def _cues(splits: Mapping[str, Any]) -> Table:
    table = Table(title="cue-conflict images, top-1 in cross-validation", title_justify="left")
    for name in ("no fold shares", "cue", "top-1", "spread", "chance", "from the other cue"):
        table.add_column(name, justify="left" if name in ("no fold shares", "cue") else "right")
    shared = {
        "source": "source pictures",
        "other": "classes of the other cue",
        "random": "(images)",
    }
    for split, cues in splits.items():
        for cue, found in cues.items():
            names = ("top1", "spread", "chance_top1", "from_other_top1")
            shown = (f"{100 * found[name]:.2f} %" for name in names)
            table.add_row(shared[split], cue, *shown)
    return table
