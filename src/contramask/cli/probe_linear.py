"""`contramask probe linear`: what a linear layer reads from frozen features.

Several sources, pools, norms and shares of the labels are trained at once: a grid.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, TypeVar

import pytorch_lightning as pl
from jsonargparse import Namespace
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from contramask.cli import probe_linear_augmented
from contramask.cli.features_cache import add_cache, cached
from contramask.cli.parser import Parser
from contramask.cli.probe_linear_augmented import preset_in
from contramask.cli.probing import (
    make_trainer,
    open_model,
    positional,
    probe_parser,
    show_result,
    write_result,
)
from contramask.cli.result_name import result_name, words_of
from contramask.probes.features import Feature, Norm, Pool
from contramask.probes.grid import LinearGrid
from contramask.probes.grid_cells import Axes, missing_classes
from contramask.probes.grid_heads import VectorNorm
from contramask.probes.grid_rows import Share
from contramask.probes.linear import LinearRecipe
from contramask.probes.presets import PRESETS
from contramask.probes.store import Bank
from contramask.training.precision import in_words
from contramask.training.stored import stored_features
from contramask.types import UserError

T = TypeVar("T")


def main(argv: Sequence[str]) -> None:
    """Probe; print the result and write it beside the run."""
    if preset_in(argv) is not None:
        probe_linear_augmented.main(argv)
        return
    parser = build_parser()
    config = parser.parse_args(positional(argv))
    opened = open_model(config.run, config.images)
    parts = parser.build(config)
    axes = axes_of(config, parts.recipe)
    trainer = make_trainer(parts.trainer.as_dict())
    parts.data.images = opened.images
    with cached(config.cache, opened, trainer) as folder:
        banks = stored_features(
            opened.backbone,
            parts.data,
            trainer,
            axes.features,
            folder=folder,
            limit=config.limit,
            transform=opened.transform,
        )
        grid = train(banks["train"], banks["val"], axes, parts.data.num_classes, trainer)
    notes = [*missing_classes(banks["train"], banks["val"]), *grid.notes]
    found = summary(grid, f"{opened.transform}{in_words(trainer)}")
    result = {"probe": "linear", **opened.about, **found, "notes": notes}
    if trainer.is_global_zero:
        others = {"limit": config.limit, "images": config.images, "precision": trainer.precision}
        out = config.out or opened.folder / f"{name_of(axes, others)}.json"
        write_result(result, out)
        show_grid(result)
        show_result(result, out)


def build_parser() -> Parser:
    """The options."""
    parser = probe_parser("linear", __doc__)
    parser.add_argument(
        "--preset",
        type=str | None,
        help="an official protocol, trained on augmented images, with options of its own: "
        f"{', '.join(PRESETS)}",
    )
    parser.add_argument(
        "--sources", type=list[str] | str, default="last", help="last, last4, block_07; several"
    )
    parser.add_argument("--pools", type=list[Pool] | Pool, default="cls", help="tokens to a vector")
    parser.add_argument("--backbone_norm", type=Norm, default="final", help="of tokens, or none")
    parser.add_argument(
        "--norms",
        type=list[VectorNorm] | VectorNorm | None,
        help="of the vector, several; default: as recipe.batch_norm says",
    )
    parser.add_argument(
        "--fractions", type=list[float] | float | None, help="of the labels; default: all of them"
    )
    parser.add_argument("--per_class", type=list[int] | int | None, help="labels of each class")
    add_cache(parser)
    parser.add_class_arguments(LinearRecipe, "recipe")
    return parser


def axes_of(config: Namespace, recipe: LinearRecipe) -> Axes:
    """The grid that the options describe. Raises `UserError`."""
    norms = several(config.norms) or (["batch"] if recipe.batch_norm else ["none"])
    if config.norms is not None and not recipe.batch_norm and "batch" in norms:
        raise UserError(
            f"--norms is {config.norms} and recipe.batch_norm false; set one of them, or both alike"
        )
    shares = [Share(fraction) for fraction in several(config.fractions)]
    shares += [Share(per_class=count) for count in several(config.per_class)]
    return Axes(
        features=tuple(
            Feature(source, pool, config.backbone_norm)
            for source, pool in product(several(config.sources), several(config.pools))
        ),
        norms=tuple(norms),
        shares=tuple(dict.fromkeys(shares)) or (Share(),),
        recipe=recipe,
    )


def name_of(axes: Axes, others: Mapping[str, Any]) -> str:
    """Of the file of the result. `others`: what a number hangs on beside the axes."""
    plain = Axes(axes.features[:1])
    grid = len(axes.inputs) * len(axes.shares) > 1
    default = {**vars(plain), "limit": None, "images": None, "precision": "32-true"}
    stem = f"linear-{'grid' if grid else words_of(axes.features[0])}"
    return result_name(stem, {**vars(axes), **others}, default)


def several(given: list[T] | T | None) -> list[T]:
    """One or several values as a list."""
    if given is None:
        return []
    return given if isinstance(given, list) else [given]


def train(train: Bank, val: Bank, axes: Axes, known: int, trainer: pl.Trainer) -> LinearGrid:
    """The grid, fitted and scored; `known`: how many classes the data say there are, 0: nobody."""
    for split, bank in (("train", train), ("val", val)):
        bank.check(split, known or 1 << 62)
    classes = int(max(train.y.max(), val.y.max())) + 1
    if classes < 2:
        raise UserError("probe: the labels have 1 class; a probe needs at least two")
    grid = LinearGrid(axes, classes, device=trainer.strategy.root_device)
    shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
    with shown_progress(disable=not shown) as progress:
        grid.fit(train, progress=progress)
        grid.score(val)
    return grid


@contextmanager
def shown_progress(*, disable: bool) -> Generator[Callable[[str, int, int], None]]:
    """Bars, one for each walk over the rows."""
    with Progress(disable=disable) as bars:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], completed=done, total=of)

        yield tell


def summary(grid: LinearGrid, transform: str) -> dict[str, Any]:
    """`values` of the best cell of the largest share, `default` (the first cell) and all cells."""
    recipe = grid.axes.recipe
    first = max(grid.cells, key=lambda cell: cell.rows)
    best = grid.best(first.share)
    row = best.row(recipe, transform)
    values = {k: round(row[k], 6) for k in ("top1", "top5") if k in row}
    chosen = "" if len(grid.cells) == 1 else ", the best of the grid on held-out rows of train"
    return {
        "values": {**values, "rate": best.rate, "images": best.images},
        "cell": f"{best.feature}, norm {best.norm}, {best.share} of the labels",
        "sweep": {str(rate): accuracy for rate, accuracy in best.sweep.items()},
        "default": grid.cells[0].row(recipe, transform),
        "grid": [cell.row(recipe, transform) for cell in grid.cells],
        "protocol": row["protocol"] + chosen,
    }


def show_grid(result: Mapping[str, Any]) -> None:
    """A table of all cells, and the notes."""
    console = Console()
    if len(result["grid"]) > 1:
        table = Table(title="best rate of each place of the grid", title_justify="left")
        titles = ("source", "pool", "norm", "labels", "rate", "held out", "top1", "top5")
        for title in titles:
            table.add_column(title, justify="right" if title in titles[4:] else "left")
        for row in result["grid"]:
            few = row["per_class"]
            labels = f"{few} per class" if few else f"{100 * row['fraction']:g} %"
            shares = [row["held_out"], row["top1"], row.get("top5")]
            table.add_row(
                *(row[k] for k in ("source", "pool", "vector_norm")),
                labels,
                f"{row['rate']:g}{' (edge)' if row['edge'] else ''}",
                *("" if s is None else f"{100 * s:.2f} %" for s in shares),
            )
        console.print(table)
        console.print(f"best on held-out rows: {result['cell']}", highlight=False, markup=False)
    for note in result["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
