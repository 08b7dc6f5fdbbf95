"""`contramask analyze` and `compare`: what any set of checkpoints does with the same images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from contramask.analysis.comparison import study_of
from contramask.analysis.portrait import Portrait
from contramask.analysis.study import Study
from contramask.analysis.suite import NAMES, Settings, suite
from contramask.checkpoints.sources import Source, named
from contramask.cli.parser import Parser
from contramask.cli.portraits import Feed, portrait_of
from contramask.cli.quiet import settle
from contramask.data.examples import Images
from contramask.types import UserError

USAGE = """\
usage: contramask analyze MODEL --data SHARDS [options]
       contramask compare MODEL MODEL ... --data SHARDS [options]

MODEL is a run directory, a folder with backbone.safetensors, a checkpoint of a known official
layout, or timm/NAME=WEIGHTS; LABEL=MODEL gives it a name of your choice in the report.
contramask compare --help tells the options.
"""


def main(argv: Sequence[str], *, least: int = 1) -> None:
    """Analyse models, compare them, write the report."""
    verb = "analyze" if least == 1 else "compare"
    if not argv:
        Console().print(USAGE, highlight=False, markup=False)
        return
    # `compare A B --data D` and `compare --data D --models A B` are the same.
    first = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    given = list(argv[first:])
    if first:
        given = ["--models", str(list(argv[:first])), *given]
    parser = build_parser(verb)
    config = parser.build(parser.parse_args(given))
    if len(config.models) < least:
        raise UserError(
            f"compare: {len(config.models)} model given; allowed are 2 and more; for one call "
            "contramask analyze"
        )
    analyze(config)


def build_parser(verb: str) -> Parser:
    """The options."""
    parser = Parser(prog=f"contramask {verb}", description=__doc__)
    parser.add_argument("-c", "--config", action="config", help="a YAML file")
    parser.add_argument("--models", type=list[str], required=True, help="see above")
    parser.add_argument("--data", type=str | list[str], required=True, help="shards, labelled best")
    parser.add_argument(
        "--other_data",
        type=str | list[str] | None,
        help="further shards: do the same channels have high variance there?",
    )
    parser.add_argument("--images", type=int, default=1024, help="the most images")
    parser.add_argument("--analyses", type=list[str], default=list(NAMES), help="which")
    parser.add_argument("--out", type=Path | None, help="default: analysis beside the one model")
    parser.add_argument("--batch_size", type=int, default=64, help="images at once")
    parser.add_argument("--workers", type=int, default=1, help="processes that decode images")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1 ...")
    parser.add_argument("--autocast", type=bool, default=False, help="forward in bfloat16")
    parser.add_argument("--size", type=int | None, help="pixels a side; default: as in training")
    parser.add_argument("--feed", type=Images | None, help="default: as each model was trained")
    parser.add_argument("--report", type=bool, default=True, help="false: the numbers alone")
    parser.add_class_arguments(Settings, "settings")
    return parser


def analyze(config: Namespace) -> Study:
    """Portraits one by one, then pairs; returns what it wrote."""
    sources = named(config.models)
    out = _folder(config.out, sources)
    suite(config.analyses, config.settings)  # a misspelt name is told before anything runs
    settle()
    console = Console(highlight=False)
    feed = Feed(
        data=config.data,
        images=config.images,
        batch=config.batch_size,
        workers=config.workers,
        device=_device(config.device),
        autocast=config.autocast,
        fed=config.feed,
        size=config.size,
        other=config.other_data,
    )
    study = _study(sources, feed, out, config, console)
    _write(study, out, console, report=config.report)
    return study


def _study(
    sources: list[Source], feed: Feed, out: Path, config: Namespace, console: Console
) -> Study:
    portraits: dict[str, Portrait] = {}
    notes: list[str] = []
    with _progress(console) as progress:
        for source in sources:
            task = progress.add_task(source.name, total=feed.images)
            try:
                portrait = portrait_of(
                    source,
                    feed,
                    out / "models" / source.name.replace("/", "_"),
                    config.analyses,
                    config.settings,
                    told=lambda done, task=task: progress.update(task, completed=done),
                )
            except UserError as error:  # the others go on
                notes.append(f"{source.name} is left out: {error}")
                continue
            seen = portrait.about["images"]
            progress.update(task, completed=seen, total=seen)
            portraits[source.name] = portrait
        if not portraits:
            raise UserError("; ".join(notes))
        count = len(portraits) * (len(portraits) + 1) // 2
        task = progress.add_task("pairs", total=count)
        seen = max(p.about["images"] for p in portraits.values())
        study = study_of(
            portraits,
            feed.about() | {"images": seen},
            replicates=config.settings.replicates,
            told=lambda a, b: progress.advance(task),
        )
    study.notes += notes
    return study


def _write(study: Study, out: Path, console: Console, *, report: bool) -> None:
    written = [*study.write(out)]
    if report:
        from contramask.report.page import write_report  # matplotlib: a second, when all is done

        written.append(write_report(study, out))
    for note in study.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    for path in written:
        console.print(f"written to {path}", markup=False, soft_wrap=True)


def _folder(out: Path | None, sources: list[Source]) -> Path:
    """Where everything goes; told at once if it cannot be written."""
    if out is None:
        first = sources[0].path
        home = first if first.is_dir() else first.parent
        out = home / "analysis" if len(sources) == 1 else Path("comparison")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror}); set --out to a folder that can"
        ) from error
    return out


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).split("\n")[0]
        raise UserError(
            f"no device {name!r} ({why}); --device is auto, cpu or cuda where there is one"
        ) from error
    return device


def _progress(console: Console) -> Progress:
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    return Progress(*columns, TimeElapsedColumn(), console=console)
