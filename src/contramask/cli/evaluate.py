"""`contramask evaluate`: a whole suite of probes of one or several models, as one table."""

import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from rich.console import Console

from contramask.checkpoints.sources import Source, named
from contramask.cli.evaluation_suite import Entry, load_suite
from contramask.cli.evaluation_table import Evaluation
from contramask.cli.parser import Parser
from contramask.cli.probe import KINDS
from contramask.cli.watching import Watch
from contramask.models.digest import digest_of
from contramask.probes.parts import Parts
from contramask.types import UserError

USAGE = """\
usage: contramask evaluate MODEL [MODEL ...] --suite standard --data.train SHARDS --data.val SHARDS

MODEL is a run directory, a folder with backbone.safetensors, a checkpoint of a known official
layout, or timm/NAME=WEIGHTS; LABEL=MODEL gives it a name of your choice in the table.
contramask evaluate --help tells the options.
"""


def main(argv: Sequence[str]) -> None:
    """Run every entry of a suite on every model; write and print the table."""
    if not argv:
        Console().print(USAGE, highlight=False, markup=False)
        return
    # `evaluate A B --suite S` and `evaluate --suite S --models A B` are the same.
    first = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    given = list(argv[first:])
    if first:
        given = ["--models", str(list(argv[:first])), *given]
    evaluate(build_parser().parse_args(given))


def build_parser() -> Parser:
    """The options."""
    parser = Parser(prog="contramask evaluate", description=__doc__)
    parser.add_argument("-c", "--config", action="config", help="a YAML file")
    parser.add_argument("--models", type=list[str], required=True, help="see above")
    parser.add_argument("--suite", type=str, default="standard", help="a name, or a YAML")
    parser.add_argument(
        "--data",
        type=dict[str, str | list[str]],
        default={},
        help="NAME: shards or folder, by the names that the suite's entries need",
    )
    parser.add_argument("--only", type=list[str] | None, help="these entries of the suite")
    parser.add_argument("--out", type=Path | None, help="default: evaluation beside the one model")
    parser.add_argument(
        "--shared",
        type=dict[str, Any],
        default={},
        help="options for all entries, e.g. {trainer: {accelerator: cpu}, data: {workers: 4}}",
    )
    parser.add_argument(
        "--watch", type=bool, default=False, help="go on with the checkpoints of a running job"
    )
    parser.add_argument("--poll", type=float, default=60.0, help="seconds between two looks")
    parser.add_argument(
        "--patience", type=float, default=24.0, help="hours without news after which to stop"
    )
    return parser


def evaluate(config: Namespace) -> Evaluation:
    """What is done already is not done again; an entry that fails leaves a note and a gap."""
    suite = load_suite(config.suite)
    _check_data(suite, config.data)
    entries = _chosen(suite, config.only)
    sources = named(config.models)
    out = _folder(config.out, sources)
    evaluation = Evaluation(entries)
    evaluation.notes += _without_data(entries, config.data)
    able = [e for e in entries if not e.missing(config.data)]
    if not able:
        raise UserError(f"evaluate: nothing can be done: {'; '.join(evaluation.notes)}")
    console = Console(highlight=False)
    runner = Runner(config.data, config.shared, out, console)
    if config.watch:
        for source in Watch(sources, out, poll=config.poll, patience=3600 * config.patience):
            runner.run(source, able, evaluation)
            evaluation.write(out)
    for source in [] if config.watch else sources:
        runner.run(source, able, evaluation)
    written = evaluation.write(out)
    console.print(evaluation.markdown(), markup=False, soft_wrap=True)
    for path in written:
        console.print(f"written to {path}", markup=False, soft_wrap=True)
    if not any(evaluation.results.values()):
        raise UserError("evaluate: no entry gave a result; see the notes above")
    return evaluation


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
            backbone, _ = source.load()
        except UserError as error:
            into.notes.append(f"{source.name} is left out: {error}")
            del into.results[source.name]
            return
        given = source.path if source.timm is None else f"timm/{source.timm}={source.path}"
        for entry in entries:
            config = entry.config(self.data, str(given), self._fitting(entry))
            key = f"{entry.name}/{digest_of(backbone, entry.verb, _sorted(config))}"
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
        names = _module(entry).build_parser().names()
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
                _module(entry).main(arguments)
        return json.loads(result.read_text("utf-8"))


def _module(entry: Entry) -> Any:
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
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    if isinstance(devices, str):
        devices = int(devices) if devices.isdecimal() else 2  # `auto`: perhaps several
    return (len(devices) if isinstance(devices, list) else max(int(devices), 1)) * int(nodes)


def _chosen(entries: list[Entry], only: Sequence[str] | None) -> list[Entry]:
    names = [e.name for e in entries]
    for name in only or ():
        if name not in names:
            raise UserError(f"evaluate: no entry {name!r}; the suite has {', '.join(names)}")
    return [e for e in entries if only is None or e.name in only]


def _check_data(entries: Sequence[Entry], data: Mapping[str, Any]) -> None:
    known = {name for e in entries for name in e.needs.values()}
    for name in data:
        if name not in known:
            raise UserError(
                f"evaluate: data.{name} is given; the suite's entries need "
                f"{', '.join(sorted(known))}"
            )


def _without_data(entries: Sequence[Entry], data: Mapping[str, Any]) -> list[str]:
    return [
        f"{e.name} is left out: give {' and '.join(f'--data.{n}' for n in e.missing(data))}"
        for e in entries
        if e.missing(data)
    ]


def _folder(out: Path | None, sources: list[Source]) -> Path:
    if out is None:
        home = sources[0].path if sources[0].path.is_dir() else sources[0].path.parent
        out = home / "evaluation" if len(sources) == 1 else Path("evaluation")
    return out


def _sorted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return [(k, _sorted(v)) for k, v in sorted(value.items())]
    return value
