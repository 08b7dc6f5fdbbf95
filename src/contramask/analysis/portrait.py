"""Everything that was found of one model, kept on disk, so that no model is analysed twice."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from contramask.analysis.analysis import Analysis
from contramask.analysis.classes import Classes, Predictions
from contramask.analysis.grams import Grams, GramStack
from contramask.analysis.pictures import Pictures
from contramask.analysis.plane import plane
from contramask.analysis.reading import Reading
from contramask.types import UserError

SHEET, ARRAYS = "portrait.json", "portrait.safetensors"
SHOWN = 4  # images whose attention is kept as pictures


@dataclass
class Portrait:
    """One model.

    Attributes:
        about: what is known of the model, see `Study.models`.
        readings: of the model alone.
        stacks: Gram matrices by the way they were taken, e.g. `flat/raw`.
        predictions: to compare decisions, where images have labels.
        pictures: 8-bit pictures by name.
        points: block -> tokens in the plane with their class, (n, 3).
        notes: what was left out and why.
    """

    about: dict[str, Any]
    readings: list[Reading]
    stacks: dict[str, GramStack] = field(default_factory=dict)
    predictions: Predictions | None = None
    pictures: dict[str, np.ndarray] = field(default_factory=dict)
    points: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        about: dict[str, Any],
        readings: Mapping[str, Reading],
        analyses: Mapping[str, Analysis],
        mean: Sequence[float],
        std: Sequence[float],
        notes: Sequence[str] = (),
    ) -> "Portrait":
        """What analyses hold after a run. A stack without a full minibatch is noted."""
        portrait = cls(about, list(readings.values()), notes=list(notes))
        for name, analysis in analyses.items():
            if isinstance(analysis, Grams):
                try:
                    portrait.stacks[analysis.name] = analysis.stack()
                except UserError as error:
                    portrait.notes.append(f"{name}: {error}")
            elif isinstance(analysis, Classes):
                portrait.predictions = analysis.predictions
            elif isinstance(analysis, Pictures):
                portrait.pictures = analysis.shown(SHOWN, mean, std)
                points = analysis.tokens.flatten(0, 1).numpy()
                classes = analysis.label.repeat_interleave(analysis.tokens.shape[1]).numpy()
                portrait.points["final"] = np.column_stack([plane(points), classes])
        return portrait

    def save(self, folder: Path, digest: str) -> None:
        """Write both files; the sheet last, so that a half-written portrait is none."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {f"grams/{k}": s.table for k, s in self.stacks.items()}
        if self.predictions is not None:
            arrays |= {f"predictions/{k}": v for k, v in self.predictions._asdict().items()}
        arrays |= {f"pictures/{k}": torch.from_numpy(v) for k, v in self.pictures.items()}
        arrays |= {f"points/{k}": torch.from_numpy(v) for k, v in self.points.items()}
        sheet = {
            "digest": digest,
            "about": self.about,
            "notes": self.notes,
            "stacks": {k: [list(s.labels), list(s.keys)] for k, s in self.stacks.items()},
            "readings": [r.to_json() for r in self.readings],
        }
        part = folder / f"{ARRAYS}.part"
        save_file({k: v.contiguous() for k, v in arrays.items()}, part)
        part.replace(folder / ARRAYS)
        part = folder / f"{SHEET}.part"
        part.write_text(json.dumps(sheet, allow_nan=False) + "\n", "utf-8")
        part.replace(folder / SHEET)

    @classmethod
    def load(cls, folder: Path, digest: str) -> "Portrait | None":
        """The portrait of the same weights, data and settings, if it is there and whole."""
        try:
            sheet = json.loads((folder / SHEET).read_text("utf-8"))
            if sheet["digest"] != digest:
                return None
            arrays = load_file(folder / ARRAYS)
            portrait = cls(sheet["about"], [Reading.from_json(r) for r in sheet["readings"]])
            for way, (labels, keys) in sheet["stacks"].items():
                table = arrays[f"grams/{way}"]
                portrait.stacks[way] = GramStack(way, tuple(labels), table, tuple(keys))
        except (OSError, ValueError, KeyError, UserError, SafetensorError):
            return None  # half-written or of another version: made again
        predictions = _under(arrays, "predictions/")
        if predictions:
            portrait.predictions = Predictions(**predictions)
        portrait.pictures = {k: v.numpy() for k, v in _under(arrays, "pictures/").items()}
        portrait.points = {k: v.numpy() for k, v in _under(arrays, "points/").items()}
        portrait.notes = sheet["notes"]
        return portrait


def _under(arrays: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
