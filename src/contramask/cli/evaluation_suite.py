"""Suites of `contramask evaluate`: which probes, on which data, and which numbers are shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from contramask.cli.recipes import folder
from contramask.data.sources import expand
from contramask.types import UserError

FOLDER = "evaluate"

Data = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """One call of a command.

    Attributes:
        name: of its result file.
        verb: `probe linear`, ..., or `finetune`.
        needs: option of the command -> name of the data it is given, e.g. `data.val: val`.
        options: further options of the command, as in its YAML.
        columns: title in the table -> name in the `values` of the result.
    """

    name: str
    verb: str
    needs: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)

    def missing(self, data: Data) -> list[str]:
        """Names of data that are not given."""
        return sorted(name for name in set(self.needs.values()) if not data.get(name))

    def config(self, data: Data, run: str, shared: Mapping[str, Any]) -> dict[str, Any]:
        """The whole configuration of the call; what the suite says wins over what is shared."""
        found: dict[str, Any] = {"run": run}
        for source in (shared, self.options):
            _merge(found, source)
        for option, name in self.needs.items():
            inner = found
            *groups, last = option.split(".")
            for group in groups:
                inner = inner.setdefault(group, {})
            inner[last] = data[name]
        return found


def load_suite(name: str) -> list[Entry]:
    """The entries of a suite, by the name of a file in configs/evaluate, or by its path.

    Raises:
        UserError: no such file, or it says something else than a suite does.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else _shipped(name)
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"no suite {name!r}; there are {', '.join(names()) or 'none'} in "
            f"configs/{FOLDER}, or give the "
            "path of a YAML with --suite"
        ) from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    entries = content.get("entries") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{path}: a suite has `entries`, NAME: {{verb, needs, options, columns}}")
    return [_entry(path, key, value) for key, value in entries.items()]


def identity(data: Sequence[str | Sequence[str]]) -> list[tuple[str, int, int]]:
    """What data are known by: name, bytes and time of change of every local file.

    An address is known by itself alone: what is changed behind it is not seen.

    Args:
        data: patterns of shards, or folders.
    """
    known: list[tuple[str, int, int]] = []
    for patterns in data:
        folder = Path(patterns) if isinstance(patterns, str) else None
        if folder is not None and folder.is_dir():
            files = [str(path) for path in sorted(folder.rglob("*")) if path.is_file()]
        else:
            files = expand(patterns, where="evaluate: data")
        for file in files:
            local = Path(file.removeprefix("file://"))
            stat = local.stat() if local.is_file() else None
            known.append((file, stat.st_size, stat.st_mtime_ns) if stat else (file, -1, -1))
    return known


def names() -> list[str]:
    """The suites that come with contramask."""
    return sorted(path.stem for path in (folder() / FOLDER).glob("*.yaml"))


def _entry(path: Path, name: str, value: Any) -> Entry:
    allowed = ("verb", "needs", "options", "columns")
    if not isinstance(value, dict) or not {"verb", "needs"} <= value.keys() <= set(allowed):
        given = ", ".join(value) if isinstance(value, dict) else repr(value)
        raise UserError(
            f"{path}: entry {name!r} has {given}; it has verb and needs, and may have options and "
            "columns"
        )
    return Entry(name, str(value["verb"]), *(value.get(key) or {} for key in allowed[1:]))


def _shipped(name: str) -> Path:
    return folder() / FOLDER / f"{name}.yaml"


def _merge(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping):
            _merge(into.setdefault(key, {}), value)
        else:
            into[key] = value
