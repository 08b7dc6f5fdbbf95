"""What an offline W&B run holds: a reader of its `.wandb` file.

The file is `:W&B`, two bytes of magic, one of version, then a LevelDB log: blocks of 32 KiB with
chunks of (crc32, length, type) and data; a record is one chunk (type 1) or several (2, 3 ..., 4).
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32 * 1024, struct.Struct("<IHB")


@dataclass
class Recorded:
    """The run's rows, configuration and way of ending."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=list)
    step_metrics: dict[str, str] = field(default_factory=dict)
    alerts: list[tuple[str, str, str]] = field(default_factory=list)  # title, text, level
    identity: str = ""
    name: str = ""
    exit_code: int | None = None


def _payloads(data: bytes) -> Iterator[bytes]:
    assert data.startswith(b":W&B")
    place, parts = 7, b""
    while place + HEADER.size <= len(data):
        rest = BLOCK - place % BLOCK
        if rest < HEADER.size:
            place += rest
            continue
        _, length, kind = HEADER.unpack_from(data, place)
        if kind == 0:
            place += rest
            continue
        place += HEADER.size
        parts += data[place : place + length]
        place += length
        if kind in (1, 4):
            yield parts
            parts = b""


def _values(items: Any) -> dict[str, Any]:
    return {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}


def read(folder: Path) -> Recorded:
    """Read the one `.wandb` file in a local run directory of W&B."""
    (path,) = folder.glob("*.wandb")
    found = Recorded()
    for payload in _payloads(path.read_bytes()):
        record = Record.FromString(payload)
        kind = record.WhichOneof("record_type")
        found.kinds.append(kind)
        if kind == "history":
            found.rows.append(_values(record.history.item))
        elif kind == "run":
            found.identity, found.name = record.run.run_id, record.run.display_name
            found.config.update(_values(record.run.config.update))
        elif kind == "metric":
            # step_metric is a number of a metric, from 1, where the writer compresses names.
            found.step_metrics[record.metric.name or record.metric.glob_name] = (
                record.metric.step_metric
            )
        elif kind == "alert":
            found.alerts.append((record.alert.title, record.alert.text, record.alert.level))
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found
