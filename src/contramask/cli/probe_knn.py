"""`contramask probe knn`: what the nearest neighbours of frozen features know.

Several metrics, cleanings of the features and numbers of neighbours are read off one extraction;
`--table true` asks for all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pytorch_lightning as pl
from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from contramask import __version__
from contramask.cli.features_cache import add_cache, cached
from contramask.cli.parser import Parser
from contramask.cli.probing import (
    Opened,
    add_feature,
    feature_of,
    make_trainer,
    open_model,
    positional,
    probe_parser,
    show_result,
    write_result,
)
from contramask.cli.result_name import result_name, words_of
from contramask.data.module import ImageShards
from contramask.functional.search import Metric
from contramask.probes.evaluation import SPLITS
from contramask.probes.features import Feature
from contramask.probes.knn_plan import TablePlan, WeightsWord, standard_cleanings
from contramask.probes.parts import Parts
from contramask.probes.store_files import identity
from contramask.training.knn_search import KNNSearch
from contramask.training.precision import in_words
from contramask.training.stored import stored_features


def main(argv: Sequence[str]) -> None:
    """Probe; print the result and write it beside the run."""
    parser = build_parser()
    config = parser.parse_args(positional(argv))
    opened, feature = open_model(config.run, config.images), feature_of(config)
    plan = plan_of(config, feature.width(opened.backbone.spec))
    parts = parser.build(config)
    trainer = make_trainer(parts.trainer.as_dict())
    parts.data.images = opened.images
    others = {"limit": config.limit, "images": config.images, "precision": trainer.precision}
    name = name_of(plan, feature, feature.width(opened.backbone.spec), others)
    out = config.out or opened.folder / f"{name}.json"
    unfinished = out.with_name(f"{out.name}.parts")
    found = from_disk(opened, feature, plan, trainer, parts.data, config, unfinished)
    result = {"probe": "knn", **opened.about, **found}
    if trainer.is_global_zero:
        write_result(result, out)
        unfinished.unlink(missing_ok=True)
        show_table(result)
        show_result(result, out)


def build_parser() -> Parser:
    """The options."""
    parser, default = probe_parser("knn", __doc__), TablePlan()
    add_feature(parser)
    parser.add_argument("--ks", type=tuple[int, ...], default=default.ks, help="neighbours")
    parser.add_argument(
        "--metrics", type=tuple[Metric, ...] | None, help="default: cosine; cosine, dot, l2"
    )
    parser.add_argument(
        "--cleanings",
        type=tuple[str, ...] | None,
        help="of features, by statistics of train; default: raw; raw, zscore, pca (whitened), pca64"
        " (so many components), top20 (so many channels of highest variance removed)",
    )
    parser.add_argument(
        "--table",
        type=bool,
        default=False,
        help="all metrics and, for m up to 400, raw, zscore, pca and topm, where not set otherwise",
    )
    parser.add_argument("--temperature", type=float, default=default.temperature, help="of votes")
    parser.add_argument(
        "--weights",
        type=WeightsWord,
        default=default.weights,
        help="of votes; auto: exp(cosine / temperature) for cosine, uniform for dot and l2",
    )
    parser.add_argument(
        "--leave_one_out",
        type=bool,
        default=False,
        help="train is queries and bank, each image without itself; data.val is not looked at",
    )
    add_cache(parser)
    return parser


def plan_of(config: Namespace, width: int) -> TablePlan:
    """What the options ask for, for features of this width. Raises `UserError`."""
    metrics: tuple[Metric, ...] = get_args(Metric) if config.table else ("cosine",)
    cleanings = standard_cleanings(width) if config.table else ("raw",)
    return TablePlan(
        metrics=metrics if config.metrics is None else config.metrics,
        cleanings=cleanings if config.cleanings is None else config.cleanings,
        ks=config.ks,
        temperature=config.temperature,
        weights=config.weights,
        leave_one_out=config.leave_one_out,
    )


def name_of(plan: TablePlan, feature: Feature, width: int, others: Mapping[str, Any]) -> str:
    """Of the file of the result. `others`: what a number hangs on beside the plan."""
    stem, default = f"knn-{words_of(feature)}", TablePlan()
    if len(plan.metrics) * len(plan.cleanings) > 1:
        default = TablePlan(metrics=get_args(Metric), cleanings=standard_cleanings(width))
        stem += "-table"
    stem += "-leave-one-out" * plan.leave_one_out
    default = vars(default) | {"limit": None, "images": None, "precision": "32-true"}
    default |= {"leave_one_out": plan.leave_one_out}
    return result_name(stem, {**vars(plan), **others}, default)


def from_disk(
    opened: Opened,
    feature: Feature,
    plan: TablePlan,
    trainer: pl.Trainer,
    data: ImageShards,
    config: Namespace,
    unfinished: Path,
) -> dict[str, Any]:
    """The result from stored features, which are extracted where they are not there yet."""
    with cached(config.cache, opened, trainer) as folder:
        banks = stored_features(
            opened.backbone,
            data,
            trainer,
            [feature],
            folder=folder,
            limit=config.limit,
            transform=opened.transform,
            splits=SPLITS[:1] if plan.leave_one_out else SPLITS,
        )
        content = {
            "version": __version__,
            "feature": str(feature),
            "plan": {k: v for k, v in asdict(plan).items() if k != "cleanings"},
            "banks": [bank.origin for bank in banks.values()],
        }
        search = KNNSearch(
            banks["train"],
            banks.get("val"),
            feature,
            plan,
            parts=lambda: Parts(unfinished, identity(content)),
        )
        trainer.validate(search, verbose=False)
        return search.result(f"{feature.about()}, {opened.transform}{in_words(trainer)}")


def show_table(result: Mapping[str, Any]) -> None:
    """Top-1 of each metric: a row for each cleaning, a column for each k; what was found."""
    console = Console()
    rows: list[Mapping[str, Any]] = result["table"]
    cells = {(r["metric"], r["cleaning"], r["k"]): r["top1"] for r in rows}
    metrics, cleanings, ks = ([*dict.fromkeys(column)] for column in zip(*cells, strict=True))
    shares = result["variance_share"]
    for metric in metrics if len(metrics) * len(cleanings) > 1 else ():
        table = Table(title=f"{metric}: top-1 in per cent", title_justify="left")
        for title in ("cleaning", "variance removed", *(f"k = {k}" for k in ks)):
            table.add_column(title, justify="left" if title == "cleaning" else "right")
        for word in cleanings:
            share = shares.get(word.removeprefix("top"))
            table.add_row(
                word,
                "" if share is None else f"{100 * share:.1f} %",
                *(f"{100 * cells[metric, word, k]:.2f}" for k in ks),
            )
        console.print(table)
    for line in [*([result["finding"]] if result["finding"] else []), *result["notes"]]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
