"""All that was found about some models on some images: the one thing the report is made of."""

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from contramask.analysis.reading import Reading, by_name
from contramask.types import UserError

COLUMNS = ("model", "other", "name", "layer", "axis", "place", "value", "low", "high", "unit")


@dataclass
class Study:
    """Readings of models, readings of pairs of models, and pictures.

    Attributes:
        models: name -> what is known of it: `path`, `backbone`, `step`, `net`, `depth`, `dim`,
            `patch`, `grid`, `parameters`, `sha256`.
        data: what the images were: `shards`, `images`, `size`, `resize`, `mean`, `std`.
        readings: (model,) or (model, other) -> readings by name.
        pictures: (model,) -> name -> 8-bit picture (H, W, 3), e.g. `attention/image_0`.
        points: (model,) -> name -> (n, 3) of x, y and a class: tokens in the plane.
        notes: what could not be compared or was left out, and why; one sentence each.
    """

    models: dict[str, dict[str, Any]]
    data: dict[str, Any]
    readings: dict[tuple[str, ...], dict[str, Reading]] = field(default_factory=dict)
    pictures: dict[tuple[str, ...], dict[str, UInt8[np.ndarray, "H W 3"]]] = field(
        default_factory=dict
    )
    points: dict[tuple[str, ...], dict[str, Float[np.ndarray, "n 3"]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, who: tuple[str, ...], readings: Iterable[Reading]) -> None:
        """Further readings of a model or of a pair."""
        self.readings.setdefault(who, {}).update(by_name(list(readings)))

    def get(self, name: str, *who: str) -> Reading | None:
        """A reading of a model or of a pair, in the order it was taken."""
        return self.readings.get(who, {}).get(name)

    def having(self, name: str) -> dict[str, Reading]:
        """model -> the reading of this name, of all models that have it, in their order."""
        found = {m: self.get(name, m) for m in self.models}
        return {m: r for m, r in found.items() if r is not None}

    def pairs(self) -> list[tuple[str, str]]:
        """The pairs with readings, in order."""
        return [(w[0], w[1]) for w in self.readings if len(w) == 2]

    def write(self, folder: Path) -> tuple[Path, Path]:
        """`results.json` and the tidy `results.csv`, each whole or not at all."""
        content = {
            "format": 1,
            "models": self.models,
            "data": self.data,
            "notes": self.notes,
            "readings": [
                {"of": list(who), **reading.to_json()}
                for who, readings in self.readings.items()
                for reading in readings.values()
            ],
        }
        json_path, csv_path = folder / "results.json", folder / "results.csv"
        part = folder / "results.part"
        part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", "utf-8")
        part.replace(json_path)
        with part.open("w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS, restval="")
            table.writeheader()
            for who, readings in self.readings.items():
                for reading in readings.values():
                    table.writerows(map(_tidy(who), reading.rows()))
        part.replace(csv_path)
        return json_path, csv_path

    @classmethod
    def read(cls, path: Path) -> "Study":
        """What `write` wrote, without pictures. Raises `UserError` if it is something else."""
        try:
            content = json.loads(path.read_text("utf-8"))
            study = cls(content["models"], content["data"], notes=content["notes"])
            for reading in content["readings"]:
                study.add(tuple(reading["of"]), [Reading.from_json(reading)])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is no result of an analysis ({error!r}); give the results.json that "
                "`contramask analyze` or `contramask compare` wrote"
            ) from error
        return study


def _tidy(who: tuple[str, ...]) -> Any:
    """Adds whose reading it is, and folds what is neither a layer nor a value into one column."""

    def row(plain: Mapping[str, Any]) -> dict[str, Any]:
        known = {k: plain[k] for k in COLUMNS if k in plain}
        other = {k: v for k, v in plain.items() if k not in COLUMNS}
        return {
            "model": who[0],
            "other": who[1] if len(who) > 1 else "",
            **known,
            "axis": "/".join(other),
            "place": "/".join(map(str, other.values())),
        }

    return row
