"""`contramask convert`: weights of others into a backbone of ours, and ours for others."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contramask.checkpoints.importing import Imported

EXAMPLES = """\
examples
  contramask convert import mae_pretrain_vit_base.pth --out weights/mae
  contramask convert import vit-s-300ep.pth.tar --out weights/mocov3 --net teacher
  contramask convert import dino_deitsmall16_pretrain.pth --out weights/dino --layout dino
  contramask convert import simmim.pth --out weights/simmim --allow yacs.config.CfgNode
  contramask probe knn weights/mae --data.train ... --data.val ...
  contramask convert export runs/NAME --format timm --out for_others"""


def main(argv: Sequence[str]) -> None:
    """Import or export, as the arguments say."""
    parser = build_parser()
    given = parser.parse_args(list(argv))
    if given.command is None:
        parser.print_help()
        return
    given.run(given)


def build_parser() -> argparse.ArgumentParser:
    """The options. Free of heavy imports."""
    parser = argparse.ArgumentParser(
        prog="contramask convert",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="command", metavar="COMMAND")
    _importing(verbs.add_parser("import", help="a checkpoint of another code, strictly"))
    _exporting(verbs.add_parser("export", help="a run's backbone for timm, ONNX or contramask"))
    return parser


def _importing(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("file", type=Path, metavar="FILE", help="a checkpoint or .safetensors file")
    verb.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="what is written")
    verb.add_argument("--net", choices=("student", "teacher"), help="default: as is published")
    verb.add_argument("--layout", metavar="NAME", help="of the file; default: recognised")
    verb.add_argument("--img_size", type=int, metavar="N", help="resize positions for N pixels")
    verb.add_argument("--interpolation", choices=("antialias", "plain", "dino"),
                      help="of positions; default: as the authors do")  # fmt: skip
    verb.add_argument("--heads", type=int, metavar="N", help="of the attention")
    verb.add_argument("--grid", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help="of patches")
    verb.add_argument("--name", metavar="MODEL", help="of the model in timm")
    verb.add_argument("--mean", type=float, nargs=3, help="of the pixels; default: ImageNet's")
    verb.add_argument("--std", type=float, nargs=3, help="of the pixels; default: ImageNet's")
    verb.add_argument("--drop", nargs="+", default=[], metavar="PART", help="leave out; head. ...")
    verb.add_argument("--allow", action="append", default=[], metavar="CLASS",
                      help="pass over objects of a class that is known to be harmless")  # fmt: skip
    verb.set_defaults(run=_import)


def _exporting(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("source", type=Path, metavar="RUN", help="a run, or a folder of a backbone")
    verb.add_argument("--net", choices=("student", "teacher"), help="default: teacher, if any")
    verb.add_argument("--format", choices=("safetensors", "timm", "onnx"), default="safetensors")
    verb.add_argument("--out", type=Path, metavar="FOLDER", help="default: RUN/export")
    verb.set_defaults(run=_export)


def _import(given: argparse.Namespace) -> None:
    from contramask.checkpoints.architecture import Wishes
    from contramask.checkpoints.importing import import_backbone, write_imported

    wishes = Wishes(
        heads=given.heads,
        grid=tuple(given.grid) if given.grid else None,
        img_size=given.img_size,
        name=given.name,
        interpolation=given.interpolation,
    )
    imported = import_backbone(
        given.file,
        net=given.net,
        layout=given.layout,
        wishes=wishes,
        allow=given.allow,
        drop=given.drop,
    )
    data = {k: v for k, v in (("mean", given.mean), ("std", given.std)) if v is not None}
    write_imported(imported, given.file, given.out, data)
    _tell(imported, given.out)


def _tell(imported: "Imported", out: Path) -> None:
    from rich.console import Console

    from contramask.checkpoints.importing import dropped_parts

    console = Console(soft_wrap=True, highlight=False)
    backbone = imported.backbone
    count = sum(p.numel() for p in backbone.parameters())
    console.print(f"layout      {imported.layout}, {imported.net}")
    console.print(f"backbone    {_arguments(backbone.config)}", markup=False)
    console.print(f"weights     {len(backbone.state_dict())} tensors, {count:,} numbers, all used")
    parts = dropped_parts(imported.dropped)
    texts = [f"{name} ({count} tensors)" if count else name for name, count in parts.items()]
    console.print(f"dropped     {', '.join(texts) or 'nothing'}", markup=False)
    for note in imported.notes:
        console.print(f"note        {note}", markup=False)
    console.print(f"written to  {out}", markup=False)


def _arguments(arguments: dict[str, Any]) -> str:
    """As they would stand in a call."""
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _export(given: argparse.Namespace) -> None:
    from rich.console import Console

    from contramask.checkpoints.exporting import export

    lines = export(given.source, net=given.net, form=given.format, out=given.out)
    console = Console(soft_wrap=True, highlight=False)
    for line in lines:
        console.print(line, markup=False)
