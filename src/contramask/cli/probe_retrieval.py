"""`contramask probe retrieval`: patches, images and distorted copies found again by similarity."""

from collections.abc import Mapping, Sequence
from typing import Any

from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from contramask.cli.parser import Parser
from contramask.cli.probing import (
    add_feature,
    feature_of,
    is_share,
    make_trainer,
    open_model,
    parts_of,
    positional,
    probe_parser,
    show_result,
    write_result,
)
from contramask.functional.retrieval import Metric
from contramask.probes.evaluation import Split
from contramask.probes.retrieval_patches import Same
from contramask.probes.retrieval_tasks import RetrievalRecipe, Task
from contramask.training.retrieval import RetrievalEvaluation, RetrievalImages


def main(argv: Sequence[str]) -> None:
    """Probe; print the result and write it beside the run."""
    parser = build_parser()
    config = parser.parse_args(positional(argv))
    recipe, feature = _recipe(config), feature_of(config)
    opened = open_model(config.run, config.images)
    parts = parser.build(config)
    name = f"retrieval-{str(feature).replace('/', '-').replace('+', '-')}.json"
    out = config.out or opened.folder / name
    evaluation = RetrievalEvaluation(
        opened.backbone,
        recipe,
        feature=feature,
        mean=opened.images.mean,
        std=opened.images.std,
        transform=opened.transform,
        folder=parts_of(out),
    )
    limits = {name: config[name] for name in ("limit", "queries", "distractors")}
    parts.data.images = opened.images
    images = RetrievalImages(parts.data, recipe, **limits)
    trainer = make_trainer(parts.trainer.as_dict())
    trainer.validate(evaluation, datamodule=images, verbose=False)
    if trainer.is_global_zero:
        result = {"probe": "retrieval", **opened.about, **evaluation.result}
        write_result(result, out)
        _show(result, out)


def build_parser() -> Parser:
    """The options."""
    parser, plain = probe_parser("retrieval", __doc__), RetrievalRecipe()
    add_feature(parser)
    for name, kind, about in (
        ("tasks", tuple[Task, ...], "which"),
        ("warps", tuple[str, ...], "none, shift4, blur4, noise20, rotate10, scale0.8 (of patches)"),
        ("metric", Metric | None, "default: dot for patches, cosine for images and copies"),
        ("cleaning", str, "raw, zscore, pca, pca64, top20; fitted on what is searched"),
        ("same", Same, "the same patch: of the same index, or at the place it was moved to"),
        ("copies", int, "distorted copies of each query image"),
        ("database", Split, "where images of a class are looked for; val: leave-one-out"),
        ("seed", int, "of noise and distortions"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=getattr(plain, name), help=about)
    parser.add_argument("--queries", type=int, default=300, help="val images, patches and copies")
    parser.add_argument(
        "--distractors", type=int, default=10_000, help="train images among which copies are sought"
    )
    return parser


def _recipe(config: Namespace) -> RetrievalRecipe:
    names = ("tasks", "warps", "metric", "cleaning", "same", "copies", "database", "seed")
    return RetrievalRecipe(**{name: config[name] for name in names})


def _show(result: Mapping[str, Any], out: Any) -> None:
    """A table of warps, one of the other values, and what was left out."""
    console, warps = Console(), _warps(result["parts"])
    if warps is not None:
        console.print(warps)
    others = {k: v for k, v in result["values"].items() if not k.startswith("patches_")}
    show_result({**result, "values": others}, out)
    for note in result["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def _warps(parts: Mapping[str, Mapping[str, int | float]]) -> Table | None:
    rows = {name.removeprefix("patches_"): v for name, v in parts.items() if "patches_" in name}
    if not rows:
        return None
    columns = list(dict.fromkeys(k for v in rows.values() for k in v if is_share(k)))
    table = Table(title="patches of warped images: what their nearest is", title_justify="left")
    table.add_column("warp")
    for column in [*columns, "queries"]:
        table.add_column(column.removesuffix("_rate").replace("_", " "), justify="right")
    for name, values in rows.items():
        shares = (f"{100 * values[c]:.3g} %" if c in values else "-" for c in columns)
        table.add_row(name, *shares, f"{values['queries']:,}" if "queries" in values else "-")
    return table
