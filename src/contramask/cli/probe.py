"""`contramask probe`: what a linear layer or the nearest neighbours read from frozen features."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from contramask.checkpoints.export import load_backbone
from contramask.cli.parser import Parser
from contramask.cli.quiet import settle
from contramask.data.module import Images, ImageShards
from contramask.models.backbone import Backbone
from contramask.probes.features import Source
from contramask.probes.linear import LinearRecipe
from contramask.training.clean_loaders import CleanImages
from contramask.training.knn import KNNEvaluation
from contramask.training.linear import LinearEvaluation
from contramask.types import UserError

KINDS = ("linear", "knn")
USAGE = (
    "usage: contramask probe linear|knn RUN --data.train SHARDS --data.val SHARDS [options]\n\n"
    "RUN is a run directory, or a folder with backbone.safetensors and backbone.yaml.\n"
    "contramask probe linear --help and contramask probe knn --help tell the options.\n"
)


def main(argv: Sequence[str]) -> None:
    """Probe an exported backbone; print the result and write it beside the run."""
    if not argv or argv[0] in ("-h", "--help"):
        Console().print(USAGE, highlight=False)
        return
    kind, rest = argv[0], list(argv[1:])
    if kind not in KINDS:
        raise UserError(f"no probe {kind!r}; there are {', '.join(KINDS)}")
    # `probe knn RUN ...` and `probe knn ... --run RUN` are the same.
    if rest and not rest[0].startswith("-"):
        rest = ["--run", *rest]
    probe(kind, build_parser(kind).parse_args(rest), build_parser(kind))


def build_parser(kind: str) -> Parser:
    """The options of one kind of probe."""
    parser = Parser(prog=f"contramask probe {kind}", description=__doc__)
    parser.add_argument("-c", "--config", action="config", help="a YAML file")
    parser.add_argument("--run", type=Path, required=True, help="the directory of a run")
    parser.add_argument("--out", type=Path | None, help="the result; default RUN/probes/NAME.json")
    parser.add_argument("--source", type=Source, default="cls", help="which feature")
    parser.add_argument("--limit", type=int | None, help="the most images of each split")
    parser.add_class_arguments(ImageShards, "data", skip={"seed", "views", "images"})
    parser.add_argument("--data.images", type=Images | None, help="default: as the run was fed")
    parser.add_class_arguments(
        pl.Trainer,
        "trainer",
        skip={"logger", "callbacks"},
        fail_untyped=False,
        instantiate=False,
    )
    parser.set_defaults({"trainer.use_distributed_sampler": False})
    if kind == "linear":
        parser.add_class_arguments(LinearRecipe, "recipe")
    else:
        parser.add_argument("--ks", type=tuple[int, ...], default=(10, 20, 100, 200))
        parser.add_argument("--temperature", type=float, default=0.07, help="of the votes")
    return parser


def probe(kind: str, config: Namespace, parser: Parser) -> dict[str, Any]:
    """Run a probe as configured; returns what it wrote."""
    backbone, sheet = load_backbone(config.run)
    fed = config.data.images
    if fed is None:
        fed = config.data.images = _images(sheet["data"])
    parts = parser.build(config)
    data = parts.data
    resize = fed.resize or round(fed.size * 8 / 7)
    transform = f"resize {resize}, centre crop {fed.size}"
    evaluation = _evaluation(kind, backbone, config, parts, transform)
    settle()
    arguments = parts.trainer.as_dict() | {"enable_checkpointing": False, "logger": False}
    trainer = pl.Trainer(**arguments | {"enable_model_summary": False})
    clean = CleanImages(data, limit=config.limit)
    trainer.validate(evaluation, datamodule=clean, verbose=False)
    result = {
        "probe": kind,
        "run": str(config.run),
        "step": sheet["step"],
        "net": sheet["weights"]["net"],
        **evaluation.result,
    }
    if trainer.is_global_zero:
        out = config.out or config.run / "probes" / f"{kind}-{config.source.replace('+', '-')}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
        _show(result, out)
    return result


def _images(data: dict[str, Any]) -> Images:
    """What the backbone was fed in training, from its sheet."""
    return Images(
        size=data["size"],
        resize=data.get("resize"),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )


def _evaluation(
    kind: str, backbone: Backbone, config: Namespace, parts: Namespace, transform: str
) -> KNNEvaluation | LinearEvaluation:
    if kind == "linear":
        return LinearEvaluation(
            backbone, recipe=parts.recipe, source=config.source, transform=transform
        )
    return KNNEvaluation(
        backbone,
        ks=tuple(config.ks),
        temperature=config.temperature,
        source=config.source,
        transform=transform,
    )


def _show(result: dict[str, Any], out: Path) -> None:
    table = Table(title=f"{result['probe']} probe of {result['run']}", title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    for name, value in result["values"].items():
        share = name.endswith(("top1", "top5"))
        table.add_row(name, f"{100 * value:.2f} %" if share else f"{value:g}")
    console = Console()
    console.print(table)
    console.print(f"protocol: {result['protocol']}", highlight=False)
    console.print(f"written to {out}", highlight=False)
