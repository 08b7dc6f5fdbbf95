"""The recipes that come with contramask: where they are, and a line about each."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from contramask.errors import UserError


def folder() -> Path:
    """`configs/`, in a source tree or inside the installed package."""
    package = Path(__file__).resolve().parents[1]
    for place in (package / "configs", package.parents[1] / "configs"):
        if (place / "pretrain").is_dir():
            return place
    raise UserError(f"no configs beside {package}: install contramask again")


def recipes(kind: str = "pretrain") -> None:
    """Print every recipe of a kind, a folder of `configs`, with the first line of its header."""
    table = Table(box=None, pad_edge=False)
    table.add_column("configuration", no_wrap=True)
    table.add_column("what it is")
    place = folder()
    for file in sorted((place / kind).glob("*.yaml")):
        first = file.read_text("utf-8").splitlines()[0].lstrip("# ")
        table.add_row(str(Path("configs") / file.relative_to(place)), first)
    Console().print(table)
