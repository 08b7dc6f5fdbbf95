"""`contramask evaluate`: a whole suite of probes of one or several models, as one table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.console import Console

from contramask.checkpoints.sources import Source, named
from contramask.cli.evaluation_runner import Runner, command_of
from contramask.cli.evaluation_suite import Entry, load_suite
from contramask.cli.evaluation_table import Evaluation
from contramask.cli.parser import Parser
from contramask.cli.watching import Watch
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
    _check_shared(suite, config.shared)
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


def _check_shared(entries: Sequence[Entry], shared: Mapping[str, Any]) -> None:
    names = {n.split(".")[0] for e in entries for n in command_of(e).build_parser().names()}
    for name in shared:
        if name not in names:
            raise UserError(
                f"evaluate: shared has {name!r}, which is an option of no command of the suite; "
                "correct --shared"
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
