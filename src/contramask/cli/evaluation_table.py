"""One row a model: the table of an evaluation as JSON, CSV and Markdown, protocols beside it."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contramask.cli.evaluation_suite import Entry
from contramask.cli.probing import is_share


@dataclass
class Evaluation:
    """What came out.

    Attributes:
        entries: the columns' origin, in order.
        results: model -> entry -> the result of the command.
        notes: what was left out, and why.
    """

    entries: Sequence[Entry]
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def columns(self) -> list[tuple[str, Entry, str]]:
        """(title, entry, name of the value) of every column that some model has."""
        return [
            (title, entry, value)
            for entry in self.entries
            for title, value in entry.columns.items()
            if any(self._number(model, entry, value) is not None for model in self.results)
        ]

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary a model; None where there is no number. Shares are fractions."""
        return [
            {"model": model} | {title: self._number(model, e, v) for title, e, v in self.columns()}
            for model in self.results
        ]

    def protocols(self) -> dict[str, dict[str, list[str]]]:
        """Entry -> protocol -> the models it is of: one protocol, unless rates were chosen."""
        found: dict[str, dict[str, list[str]]] = {}
        for model, results in self.results.items():
            for name, result in results.items():
                found.setdefault(name, {}).setdefault(result["protocol"], []).append(model)
        return found

    def markdown(self) -> str:
        """The table, then each column's protocol, then notes."""
        columns = self.columns()
        lines = [
            " | ".join(["| model", *(f"{t}{', %' if is_share(v) else ''}" for t, _, v in columns)]),
            "|---" * (len(columns) + 1),
        ]
        for model in self.results:
            cells = [_shown(self._number(model, e, v), v) for _, e, v in columns]
            lines.append(" | ".join([f"| {model}", *cells]))
        text = "\n".join(f"{line} |" if line.startswith("| ") else f"{line}|" for line in lines)
        told = [
            f"- {name} ({', '.join(models)}): {protocol}"
            for name, protocols in self.protocols().items()
            for protocol, models in protocols.items()
        ]
        parts = [text, "Protocols:\n\n" + "\n".join(told)] if told else [text]
        if self.notes:
            parts.append("Notes:\n\n" + "\n".join(f"- {note}" for note in self.notes))
        return "\n\n".join(parts) + "\n"

    def csv(self) -> str:
        """The table alone, shares as fractions."""
        rows = self.rows()
        text = io.StringIO()
        names = ["model", *(title for title, _, _ in self.columns())]
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def json(self) -> str:
        """Everything."""
        content = {
            "rows": self.rows(),
            "protocols": self.protocols(),
            "notes": self.notes,
            "results": self.results,
        }
        return json.dumps(content, indent=2, allow_nan=False) + "\n"

    def write(self, folder: Path) -> list[Path]:
        """`evaluation.json`, `.csv` and `.md`, each whole under its name."""
        written = []
        texts = {"json": self.json(), "csv": self.csv(), "md": self.markdown()}
        for suffix, text in texts.items():
            path = folder / f"evaluation.{suffix}"
            temporary = path.with_name(f".{path.name}")
            temporary.write_text(text, "utf-8")
            temporary.replace(path)
            written.append(path)
        return written

    def _number(self, model: str, entry: Entry, value: str) -> float | None:
        result: Mapping[str, Any] = self.results[model].get(entry.name, {})
        return result.get("values", {}).get(value)


def _shown(number: float | None, name: str) -> str:
    if number is None:
        return "-"
    return f"{100 * number:.1f}" if is_share(name) else f"{number:.4g}"
