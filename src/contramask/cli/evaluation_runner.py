"""Calls the commands of a suite, and keeps what they found."""

import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from contramask import __version__
from contramask.checkpoints.sources import Source
from contramask.cli.evaluation_suite import Entry, identity
from contramask.cli.evaluation_table import Evaluation
from contramask.cli.probe import KINDS
from contramask.models.digest import digest_of
from contramask.probes.parts import Parts
from contramask.types import UserError


class Runner:
    """Calls the commands of entries, and keeps what they found.

    Args:
        data: by the names that entries need.
        shared: options for every command.
        out: where results go, a folder a model.
        console: where it is said what is done.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        shared: Mapping[str, Any],
        out: Path,
        console: Console,
    ):
        self.data, self.shared, self.out, self.console = data, shared, out, console
        self.parts = Parts(out / "parts.jsonl", "evaluation 1")

    def run(self, source: Source, entries: Sequence[Entry], into: Evaluation) -> None:
        """All entries of one model."""
        results = into.results.setdefault(source.name, {})
        try:
            backbone, about = source.load()
        except UserError as error:
            into.notes.append(f"{source.name} is left out: {error}")
            del into.results[source.name]
            return
        given = source.path if source.timm is None else f"timm/{source.timm}={source.path}"
        for entry in entries:
            config = entry.config(self.data, str(given), self._fitting(entry))
            data = [self.data[name] for name in sorted(set(entry.needs.values()))]
            hangs_on = (about["data"], entry.verb, _sorted(config), identity(data), __version__)
            key = f"{entry.name}/{digest_of(backbone, backbone.spec, backbone.config, *hangs_on)}"
            if key not in self.parts.done:
                self.console.print(f"{source.name}: {entry.name}", markup=False)
                try:
                    self.parts.add(key, self._call(source.name, entry, config))
                except UserError as error:
                    into.notes.append(f"{source.name}: {entry.name} is left out: {error}")
                    continue
            results[entry.name] = self.parts.done[key]

    def _fitting(self, entry: Entry) -> dict[str, Any]:
        """What is shared, as far as the command has such options."""
        names = command_of(entry).build_parser().names()
        return {
            k: v for k, v in self.shared.items() if any(f"{n}.".startswith(f"{k}.") for n in names)
        }

    def _call(self, model: str, entry: Entry, config: Mapping[str, Any]) -> dict[str, Any]:
        """Run a command on its YAML; returns the result it wrote."""
        folder = self.out / model.replace("/", "_")
        folder.mkdir(parents=True, exist_ok=True)
        result = folder / f"{entry.name}.json"
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / f"{entry.name}.yaml"
            path.write_text(yaml.safe_dump({**config, "out": str(result)}), "utf-8")
            arguments = ["-c", str(path)]
            if _ranks(config) > 1:
                # Lightning starts its ranks by the command line: it must be that of the probe.
                _command([*entry.verb.split(), *arguments])
            else:
                command_of(entry).main(arguments)
        return json.loads(result.read_text("utf-8"))


def command_of(entry: Entry) -> Any:
    """What runs an entry. Raises `UserError`."""
    verb, _, kind = entry.verb.partition(" ")
    if verb == "finetune":
        return importlib.import_module("contramask.cli.finetune")
    if verb == "probe" and kind in KINDS:
        return importlib.import_module(f"contramask.cli.{KINDS[kind][0]}")
    raise UserError(
        f"evaluate: entry {entry.name!r} has verb {entry.verb!r}; allowed are finetune and probe "
        f"with {', '.join(KINDS)}; correct the suite"
    )


def _command(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "contramask", *arguments], check=False, stderr=subprocess.PIPE
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise UserError(f"status {done.returncode}: {lines[-1]}")


def _ranks(config: Mapping[str, Any]) -> int:
    """How many processes the trainer of a command will start, as far as its options tell."""
    trainer = config.get("trainer", {})
    devices, nodes = trainer.get("devices", "auto"), trainer.get("num_nodes", 1)
    if isinstance(devices, str):  # `auto` is one on the CPU, and all GPUs there are
        alone = trainer.get("accelerator") == "cpu"
        many = 1 if alone else torch.cuda.device_count()
        devices = int(devices) if devices.isdecimal() else many
    return (len(devices) if isinstance(devices, list) else max(int(devices), 1)) * int(nodes)


def _sorted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return [(k, _sorted(v)) for k, v in sorted(value.items())]
    return value
