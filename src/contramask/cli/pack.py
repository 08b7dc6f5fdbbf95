"""`contramask pack`: images to WebDataset shards with an index; check and index shards."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contramask.data.layouts import Listing
    from contramask.data.pack import Packing

EXAMPLES = """\
examples
  contramask pack imagefolder ~/imagenet/train shards/train      shards/train-000000.tar ...
  contramask pack imagefolder ~/imagenet/val shards/val          the same classes, by classes.json
  contramask pack manifest photos.csv shards/photos              columns path, label, mask, ...
  contramask pack torchvision ~/data shards/cifar10 --name cifar10
  contramask pack index 'old/*.tar'                              an index for shards you have
  contramask pack --check 'shards/train-*.tar'                   read all, name what differs"""
NAMED = 20  # bad images that are shown by name


def main(argv: Sequence[str]) -> None:
    """Pack, index or check, as the arguments say."""
    parser = build_parser()
    given = parser.parse_args(list(argv))
    if given.check:
        sys.exit(check(given.check, given.processes, decode=given.decode))
    if given.command is None:
        parser.print_help()
        return
    given.run(given)


def build_parser() -> argparse.ArgumentParser:
    """The options. Free of heavy imports."""
    parser = argparse.ArgumentParser(
        prog="contramask pack",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _processes(parser)
    parser.add_argument("--check", nargs="+", metavar="SHARDS", help="verify shards and indexes")
    parser.add_argument("--decode", action="store_true", help="with --check: decode all images")
    verbs = parser.add_subparsers(dest="command", metavar="COMMAND")
    folder = verbs.add_parser("imagefolder", help="FOLDER/CLASS/*.jpg, or a folder of images")
    folder.add_argument("source", type=Path, metavar="FOLDER")
    folder.add_argument("prefix", type=Path, metavar="OUT", help="OUT-000000.tar and so on")
    folder.add_argument("--masks", type=Path, metavar="DIR", help="DIR/CLASS/*.png -> seg.png")
    table = verbs.add_parser("manifest", help="a .csv, .tsv or .jsonl that lists images")
    table.add_argument("source", type=Path, metavar="FILE")
    table.add_argument("prefix", type=Path, metavar="OUT", help="OUT-000000.tar and so on")
    table.add_argument("--root", type=Path, help="where paths begin; default: beside the file")
    known = verbs.add_parser("torchvision", help="CIFAR, STL-10 or Imagenette as downloaded")
    known.add_argument("source", type=Path, metavar="ROOT")
    known.add_argument("prefix", type=Path, metavar="OUT", help="folder for train-*.tar, val-*.tar")
    names = ("cifar10", "cifar100", "stl10", "imagenette")
    known.add_argument("--name", required=True, choices=names)
    for verb, run in ((folder, _folder), (table, _manifest), (known, _torchvision)):
        _writing(verb)
        verb.set_defaults(run=run)
    index = verbs.add_parser("index", help="make the index of shards that have none")
    index.add_argument("shards", nargs="+", metavar="SHARDS", help="paths, globs, braces, folders")
    index.add_argument("--out", metavar="FILE", help="one index file, where the shards' folder is "
                       "read-only; name it in data.streaming.index")  # fmt: skip
    _processes(index)
    index.set_defaults(run=_index)
    return parser


def check(shards: Sequence[str], processes: int, *, decode: bool = False) -> int:
    """Reads all shards and prints what is wrong with them; 1 if anything is."""
    from rich.console import Console

    from contramask.data.index import verify

    with _progress("checking shards") as progress:
        wrong = verify(list(shards), processes=processes, decode=decode, progress=progress)
    console = Console(highlight=False, soft_wrap=True)
    for line in wrong:
        console.print(line, markup=False)
    console.print(f"{len(wrong)} faults" if wrong else "all shards are as their index says")
    return 1 if wrong else 0


def _folder(given: argparse.Namespace) -> None:
    from contramask.data.layouts import image_folder
    from contramask.data.pack import read_classes

    classes = read_classes(given.prefix.parent)
    listing = image_folder(given.source, classes=classes, masks=given.masks)
    _pack(listing, given.prefix, _packing(given))


def _manifest(given: argparse.Namespace) -> None:
    from contramask.data.layouts import manifest
    from contramask.data.pack import read_classes

    classes = read_classes(given.prefix.parent)
    listing = manifest(given.source, root=given.root, classes=classes)
    _pack(listing, given.prefix, _packing(given))


def _torchvision(given: argparse.Namespace) -> None:
    from contramask.data.layouts import torchvision

    for split, listing in torchvision(given.source, given.name).items():
        _pack(listing, given.prefix / split, _packing(given))


def _index(given: argparse.Namespace) -> None:
    from rich.console import Console

    from contramask.data.index import build_index

    with _progress("reading shards") as progress:
        index = build_index(
            given.shards, processes=given.processes, out=given.out, progress=progress
        )
    console = Console(highlight=False)
    console.print(f"{index.samples} samples in {len(index.shards)} shards, indexed")
    foreign = sorted({suffix for shard in index.shards for suffix in shard.foreign})
    if foreign:
        console.print(f"passed over members of these suffixes: {', '.join(foreign)}", markup=False)


def _pack(listing: "Listing", prefix: Path, packing: "Packing") -> None:
    from rich.console import Console

    from contramask.data.pack import pack

    with _progress(f"packing {prefix}") as progress:
        packed = pack(
            listing.originals, prefix, classes=listing.classes, packing=packing, progress=progress
        )
    console = Console(highlight=False, soft_wrap=True)
    for line in packed.bad[:NAMED]:
        console.print(f"left out {line}", markup=False)
    if len(packed.bad) > NAMED:
        console.print(f"left out {len(packed.bad) - NAMED} more")
    if listing.aside:
        console.print(f"passed over files that are no images: {listing.aside}", markup=False)
    samples = sum(shard.count for shard in packed.shards)
    size = sum(shard.bytes for shard in packed.shards) / 1e6
    last = len(packed.shards) - 1
    numbers = f"{{000000..{last:06d}}}" if last else "000000"
    console.print(
        f"{samples} samples, {size:.1f} MB: {prefix}-{numbers}.tar"
        f"{f', {len(listing.classes)} classes' if listing.classes else ''}"
        f"{f', {len(packed.bad)} bad images left out' if packed.bad else ''}",
        markup=False,
    )


def _packing(given: argparse.Namespace) -> "Packing":
    from contramask.data.originals import Encoding
    from contramask.data.pack import Packing

    return Packing(
        max_mb=given.max_mb,
        max_count=given.max_count,
        seed=given.seed if given.shuffle else None,
        processes=given.processes,
        encoding=Encoding(given.resize, given.quality, given.verify),
        max_bad=given.max_bad,
        overwrite=given.overwrite,
    )


def _writing(parser: argparse.ArgumentParser) -> None:
    toggle = argparse.BooleanOptionalAction
    add = parser.add_argument
    add("--max-mb", type=_positive(float), default=1000.0, help="of a shard (1000)")
    add("--max-count", type=_positive(int), default=10_000, help="samples of a shard (10000)")
    add("--shuffle", action=toggle, default=True, help="training needs it; on by default")
    add("--seed", type=int, default=0, help="of that order (0)")
    add("--resize", type=_positive(int), metavar="PIXELS", help="shorter side, at most")
    add("--quality", type=_positive(int, 100.0), help="make all images JPEGs of this quality")
    add("--verify", action=toggle, default=True, help="decode all images to find damaged ones")
    add("--max-bad", type=float, default=0.01, help="fraction that may be left out (0.01)")
    add("--overwrite", action="store_true", help="replace shards of the same name")
    _processes(parser)


def _processes(parser: argparse.ArgumentParser) -> None:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    # A default here would overwrite what was given before the verb.
    default = argparse.SUPPRESS if parser.prog.count(" ") > 1 else cores
    text = f"that read and check (all {cores} cores)"
    parser.add_argument("--processes", type=_positive(int), default=default, help=text)


def _positive(
    kind: type[int] | type[float], top: float = float("inf")
) -> Callable[[str], int | float]:
    def parse(text: str) -> int | float:
        value = kind(text)
        if not 0 < value <= top:
            allowed = "above 0" if top == float("inf") else f"in (0, {top:g}]"
            raise argparse.ArgumentTypeError(f"{text} is not allowed, numbers {allowed} are")
        return value

    parse.__name__ = "number"
    return parse


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with time left, on a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed
    from rich.progress import TimeRemainingColumn as Remaining

    text = TextColumn("{task.description}", markup=False)
    with Progress(text, BarColumn(), MofNCompleteColumn(), Elapsed(), Remaining()) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
