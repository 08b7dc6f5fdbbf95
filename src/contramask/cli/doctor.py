"""`contramask doctor`: what is there, and what is wrong with it."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from contramask.cli import doctor_checks as checks
from contramask.cli.doctor_checks import Finding
from contramask.errors import UserError

_STYLES = {"ok": "green", "note": "cyan", "warn": "yellow", "broken": "bold red"}
SAMPLES = 16  # decoded of each set of shards


def main(argv: Sequence[str]) -> None:
    """Look at everything and tell it; end with status 1 if something is broken."""
    parser = argparse.ArgumentParser(prog="contramask doctor", description=__doc__)
    parser.add_argument("--data", nargs="+", default=[], metavar="SHARDS", help="shards to look at")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="directory of all runs")
    given = parser.parse_args(list(argv))
    groups = examine(given.root, given.data)
    console = Console()
    if not console.is_terminal:  # a log: no line is broken where a terminal's would be
        console = Console(width=max(console.width, 160))
    for name, findings in groups.items():
        console.print(_table(name, findings))
    states = [finding.state for findings in groups.values() for finding in findings]
    broken, warned = states.count("broken"), states.count("warn")
    style = "broken" if broken else "warn" if warned else "ok"
    console.print(Text(_verdict(broken, warned), style=_STYLES[style]))
    if broken:
        sys.exit(1)


def examine(root: Path, patterns: Sequence[str]) -> dict[str, list[Finding]]:
    """All findings by group."""
    groups = {
        "Software": checks.software(),
        "Devices": checks.devices(),
        "Cluster": checks.cluster(os.environ),
        "Disks": checks.disks(root),
        "Tracking": checks.wandb(os.environ),
    }
    if patterns:
        groups["Data"] = [f for pattern in patterns for f in data(pattern)]
    return groups


def data(pattern: str) -> list[Finding]:
    """Shards of a pattern against their index, and a few of their images."""
    from contramask.data.module import Images, ImageShards

    module = ImageShards(pattern, batch_size=SAMPLES, workers=0, images=Images(size=32))
    try:
        shards, index = module.train_shards, module.train_shards.index
        if index is None:
            advice = f"contramask pack index '{pattern}': exact resume and even ranks need one"
            found = [Finding("index", f"{len(shards.urls)} shards without one", "warn", advice)]
        else:
            text = f"{len(shards.urls)} shards, {index.samples:,} samples, sizes as indexed"
            classes = f", {index.labels} classes" if index.labels else ", no labels"
            found = [Finding("index", text + classes)]
        batches = list(module.clean_dataloader("train", limit=SAMPLES))
    except UserError as error:
        return [Finding(pattern, str(error), "broken")]
    decoded = sum(len(batch["label"]) for batch in batches)
    expected = 1 if index is None else min(SAMPLES, index.samples)
    if decoded < expected:
        advice = "contramask pack --check names every sample that is bad"
        text = f"{decoded} of {expected} samples decoded"
        state = "warn" if decoded else "broken"
        return [*found, Finding("samples", text, state, advice)]
    return [*found, Finding("samples", f"{decoded} decoded")]


def _table(name: str, findings: Sequence[Finding]) -> Table:
    table = Table(title=name, title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(width=6)
    table.add_column(no_wrap=True, min_width=22)
    table.add_column(overflow="fold")
    for one in findings:
        state = Text(one.state if one.state != "broken" else "BROKEN", style=_STYLES[one.state])
        text = Text(one.text)
        if one.advice:
            text.append(f"\n-> {one.advice}", style=_STYLES[one.state])
        table.add_row(state, one.name, text)
    return table


def _verdict(broken: int, warned: int) -> str:
    warnings = f"{warned} warning{'s' * (warned != 1)}" if warned else ""
    if broken:
        return f"{broken} broken" + (f", {warnings}" if warned else "")
    return warnings or "all well"
