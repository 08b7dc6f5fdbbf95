"""Numbers of a run as lines of JSON in the run directory, whatever else watches.

`metrics.jsonl` is only ever appended to, a line at a time, so a killed run loses at most its last
line. `read_metrics` makes one row a step of it: keys written at the same step are joined, the last
value of a key wins, and a resume drops what the lost part of the run had written after its step.
"""

import csv
import json
import logging
import math
import os
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

log = logging.getLogger(__name__)

Row = dict[str, int | float]

# JSON has no such numbers; as strings every parser reads the file.
_NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class JSONLLogger(Logger):
    """Appends metrics to `metrics.jsonl` in `run_dir`, and leaves a `metrics.csv` at the end.

    A line is `{"step": 100, "time": 1760000000.123, "train/loss": 4.2, ...}`; time is in seconds
    since 1970, `NaN`, `Infinity` and `-Infinity` are strings. Only rank 0 writes. A full disk
    stops the numbers and says so; it does not stop the training.
    """

    def __init__(self, run_dir: str | Path):
        super().__init__()
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / "metrics.jsonl"
        self._file: int | None = None
        self._torn = False
        self._step = 0

    @property
    def name(self) -> str:
        """The name of the run directory."""
        return self.run_dir.name

    @property
    def version(self) -> str:
        """Empty: a run directory holds one run."""
        return ""

    @property
    def save_dir(self) -> str:
        """The directory of all runs, so that save_dir/name/version is the run directory."""
        return str(self.run_dir.parent)

    @property
    def log_dir(self) -> str:
        """The run directory."""
        return str(self.run_dir)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append one line. Lightning's epoch is left out: the training stream has no end."""
        self._step = self._step if step is None else step
        values = {k: _number(v) for k, v in metrics.items() if k != "epoch"}
        if values:
            self._append({"step": self._step, "time": round(time.time(), 3), **values})

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kw: Any) -> None:
        """Nothing: the record of the configuration is `config.yaml`."""

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Training goes on at `step`: rows of later steps belong to a part that was lost."""
        if self.path.exists():
            self._append({"rewind": step, "time": round(time.time(), 3)})

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file and derive `metrics.csv`."""
        if self._file is None:
            return
        os.close(self._file)
        self._file = None
        try:
            write_csv(self.path)
        except OSError as error:
            log.error("no metrics.csv: %s; %s has the same numbers", error, self.path)

    def _append(self, row: dict[str, Any]) -> None:
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            if self._file is None:
                self._file = _open(self.path)
            # A line that did not fit is ended, so that it spoils no other.
            if self._torn:
                self._torn = os.write(self._file, b"\n") == 0
            if os.write(self._file, line) < len(line):
                raise OSError("the disk took only a part of the line")
        except OSError as error:
            if not self._torn:
                log.error("cannot write %s: %s; training goes on without it", self.path, error)
            self._torn = True


def read_metrics(path: str | Path) -> list[Row]:
    """The rows of a `metrics.jsonl` or of the run directory that holds it, one a step, in order.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "metrics.jsonl"
    rows: dict[int, Row] = {}
    for line in _lines(path):
        if "rewind" in line:
            rows = {step: row for step, row in rows.items() if step <= line["rewind"]}
        else:
            values = {
                k: _NAMES.get(v, math.nan) if isinstance(v, str) else v for k, v in line.items()
            }
            rows.setdefault(line["step"], {}).update(values)
    return [rows[step] for step in sorted(rows)]


def write_csv(path: str | Path, to: str | Path | None = None) -> Path:
    """Write the rows of a `metrics.jsonl` as a table: a row a step, a column a key, sorted.

    Args:
        path: `metrics.jsonl`.
        to: the table; None: `metrics.csv` beside it. Replaced whole or not at all.
    """
    rows, to = read_metrics(path), Path(to or Path(path).with_name("metrics.csv"))
    keys = sorted({key for row in rows for key in row} - {"step", "time"})
    part = to.with_name(f"{to.name}.tmp.{os.getpid()}")
    with part.open("w", newline="") as file:
        table = csv.DictWriter(file, ["step", "time", *keys], restval="")
        table.writeheader()
        table.writerows(rows)
    part.replace(to)
    return to


def _number(value: Any) -> int | float | str:
    number = value.item() if isinstance(value, Tensor) else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        number = float(number)
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "Infinity" if number > 0 else "-Infinity"
    # Lightning's metrics are float32: 9.375e-06 and not 9.375000445288606e-06.
    with np.errstate(over="ignore", under="ignore"):
        single = np.float32(number)
    short = isinstance(number, float) and float(single) == number
    return float(str(single)) if short else number


def _open(path: Path) -> int:
    """A descriptor to append to; a last line that a killed run left unfinished is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        kept = path.read_bytes().rfind(b"\n") + 1
        if kept < path.stat().st_size:
            log.warning("%s ends in an unfinished line; cut off", path)
            os.truncate(path, kept)
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole line as an object; others are named, save an unfinished last one."""
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            if number < len(lines):
                log.warning("%s: line %d is no JSON; left out", path, number)
            continue
        if isinstance(row, dict) and ({"step", "rewind"} & row.keys()):
            yield row
        else:
            log.warning("%s: line %d has no step; left out", path, number)
