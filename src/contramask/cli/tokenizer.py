"""`contramask tokenizer fit`: a codebook of patches, so that BEiT needs nothing downloaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from jsonargparse import Namespace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from contramask.cli.parser import Parser
from contramask.cli.quiet import settle
from contramask.data.module import ImageShards
from contramask.functional.kmeans import kmeans, nearest, perplexity
from contramask.models.tokenizers.files import save_tokenizer
from contramask.models.tokenizers.patches import PatchTokenizer, patches_of
from contramask.types import UserError, fold

USAGE = (
    "usage: contramask tokenizer fit --data.train SHARDS --out tokenizer.safetensors [options]\n\n"
    "Fits the visual words of BEiT: k-means over patches of clean images.\n"
    "contramask tokenizer fit --help tells the options.\n"
)
HELD_OUT = 0.1  # of the images: what the printed usage is measured on


def main(argv: Sequence[str]) -> None:
    """Fit a tokenizer and write it."""
    if not argv or argv[0] in ("-h", "--help"):
        Console().print(USAGE, highlight=False)
        return
    if argv[0] != "fit":
        raise UserError(f"no command {argv[0]!r} of tokenizer; there is fit")
    parser = build_parser()
    fit(parser, parser.parse_args(list(argv[1:])))


def build_parser() -> Parser:
    """The options."""
    parser = Parser(prog="contramask tokenizer fit", description=__doc__)
    add = parser.add_argument
    add("-c", "--config", action="config", help="a YAML file")
    add("--out", type=Path, required=True, help="where to, a .safetensors file")
    add("--vocabulary", type=int, default=8192, help="words")
    add("--patch", type=int, default=8, help="pixels a side of a word")
    add("--grid", type=int, default=14, help="words a side of an image, as the backbone's patches")
    add("--limit", type=int, default=5000, help="the most images to look at")
    add("--steps", type=int, default=200, help="of mini-batch k-means")
    add("--batch", type=int, default=16384, help="patches of a step")
    add("--seed", type=int, default=0, help="of the images' choice and of k-means")
    parser.add_class_arguments(ImageShards, "data", skip={"seed", "views"})
    return parser


def fit(parser: Parser, config: Namespace) -> dict[str, Any]:
    """Fit as configured; returns the facts that were written beside the codebook."""
    if config.out.suffix != ".safetensors":
        raise UserError(f"--out is {config.out}; give a name that ends in .safetensors")
    for name in ("vocabulary", "patch", "grid", "limit", "steps", "batch"):
        if config[name] < (2 if name in ("vocabulary", "limit") else 1):
            raise UserError(f"--{name} is {config[name]}; give a larger number")
    config.data.seed = fold(config.seed, "tokenizer") % 2**32
    data: ImageShards = parser.build(config).data
    settle()
    console = Console()
    with _bar(console) as bar:
        images = _images(data, config, bar)
        kept = len(images) - max(1, round(HELD_OUT * len(images)))
        if kept < 1:
            raise UserError(f"{len(images)} image to fit to; give shards of more")
        task = bar.add_task("k-means", total=config.steps)
        codebook = kmeans(
            patches_of(images[:kept], config.patch),
            config.vocabulary,
            steps=config.steps,
            batch=config.batch,
            seed=fold(config.seed, "k-means"),
            tell=lambda step: bar.update(task, completed=step),
        )
    facts = _facts(config, images[kept:], codebook, kept)
    save_tokenizer(PatchTokenizer(codebook), config.out, **facts)
    console.print(
        f"{config.vocabulary} words of {config.patch} x {config.patch} pixels from {kept} images; "
        f"on {len(images) - kept} others {facts['used']} are used, perplexity "
        f"{facts['perplexity']:.0f}, error {facts['error']:.4f} (of patches' variance "
        f"{facts['variance']:.4f})\nwritten to {config.out}; use it as "
        f"model.objectives.NAME.init_args.tokenizer",
        highlight=False,
        soft_wrap=True,
    )
    return facts


def _images(data: ImageShards, config: Namespace, bar: Progress) -> Float[Tensor, "M 3 S S"]:
    """Clean images in [0, 1] at the size the tokenizer will see."""
    size, found = config.patch * config.grid, []
    mean, std = (torch.tensor(getattr(data.images, k))[:, None, None] for k in ("mean", "std"))
    task = bar.add_task("images", total=min(config.limit, data.num_train or config.limit))
    for batch in data.clean_dataloader("train", config.limit):
        (image,) = data.to_device(batch, "cpu")["views"]["clean"].cpu() * std + mean
        if image.shape[2] != size:
            image = F.interpolate(image, size=(size, size), mode="bicubic", antialias=True)
        found.append(image.clamp(0, 1))
        bar.advance(task, len(image))
    return torch.cat(found)


def _facts(
    config: Namespace, images: Float[Tensor, "M 3 S S"], codebook: Float[Tensor, "V P"], kept: int
) -> dict[str, Any]:
    patches = patches_of(images, config.patch)
    ids = nearest(patches, codebook)
    effective, used = perplexity(ids, config.vocabulary)
    return {
        "perplexity": effective,
        "used": used,
        "error": float((patches - codebook[ids]).square().mean()),
        "variance": float(patches.var(0).mean()),
        "images": kept,
        "steps": config.steps,
        "seed": config.seed,
    }


def _bar(console: Console) -> Progress:
    text = TextColumn("{task.description}", markup=False)
    return Progress(text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console)
