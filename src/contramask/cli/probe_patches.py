"""`contramask probe patches`: what single patches know, by few-shot semantic segmentation.

Nearest neighbours and a linear layer on frozen patch tokens, of images in shards with masks
(KEY.jpg, KEY.seg.png): a table of sources (layers) x metrics x cleanings x k, after Vanyan et al.,
arXiv:2401.00463. Their protocol on Cityscapes: --tile 256 --sources all --metrics '[dot]'
--cleanings '[raw, zscore, top200]' --train_images 72.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from contramask.cli.parser import Parser
from contramask.cli.probing import (
    Opened,
    make_trainer,
    open_model,
    positional,
    probe_parser,
    show_result,
    write_result,
)
from contramask.data.dense import Dense
from contramask.data.dense_shards import DenseShards
from contramask.functional.neighbours import Weights
from contramask.functional.search import Metric
from contramask.functional.segmentation import Edge, PatchLabel
from contramask.models.digest import digest_of
from contramask.probes.features import Feature, Norm
from contramask.probes.linear import LinearRecipe
from contramask.probes.parts import Parts
from contramask.probes.patches import OF_PATCHES, PatchRecipe
from contramask.training.passes import missing
from contramask.training.patches import PatchEvaluation
from contramask.types import UserError

DEFAULT = PatchRecipe()
FORMAT = "patches 2"  # of what is kept; raised when the same settings give other numbers
# Tiles are not cut from a resized image, and masks have classes of their own.
FED = ("size", "mean", "std", "min_side")


def main(argv: Sequence[str]) -> None:
    """Probe; print the table and write it beside the run."""
    parser = build_parser()
    config = parser.parse_args(positional(argv))
    parts = parser.build(config)
    opened = open_model(config.run, config.images, FED)
    sources = sources_of(config.sources, opened.backbone.spec.depth)
    recipe = recipe_of(config, parts.recipe)
    data = feed(parts.data, config, opened)
    out = config.out or opened.folder / f"patches-{short(sources)}.json"
    trainer = make_trainer(parts.trainer.as_dict())
    together = [sources[i : i + config.together] for i in range(0, len(sources), config.together)]
    groups = {" ".join(group): group for group in together}
    kept = kept_of(trainer, out, data, opened, config.norm, recipe, sources)
    done = {} if kept is None else kept.done
    first = next(iter(groups))
    for name in missing(trainer, list(groups), done):
        data.pictures = name == first and config.pictures > 0
        evaluation = PatchEvaluation(
            opened.backbone,
            data.dense,
            sources=groups[name],
            norm=config.norm,
            recipe=recipe,
            names=data.names,
            pictures=(out.parent / "patches", config.pictures) if data.pictures else None,
        )
        trainer.validate(evaluation, datamodule=data, verbose=False)
        if kept is not None:
            kept.add(name, evaluation.result)
    if kept is not None:
        results = [kept.done[name] for name in groups]
        finish({"probe": "patches", **opened.about, **joined(results, data)}, out)
        kept.path.unlink()


def kept_of(
    trainer: pl.Trainer, out: Path, data: DenseShards, opened: Opened, *settings: Any
) -> Parts | None:
    """What is done already: kept by the first rank, which tells the others."""
    held = (data.dense, data.about(), data.names)  # on all ranks: mistakes are told on all
    if not trainer.is_global_zero:
        return None
    run = (FORMAT, str(trainer.precision), trainer.limit_val_batches)
    digest = digest_of(opened.backbone, *run, *held, *settings)
    return Parts(out.with_name(f".{out.stem}.parts.jsonl"), digest)


def recipe_of(config: Namespace, linear: LinearRecipe) -> PatchRecipe:
    """What the options say is to be probed. Raises `UserError`."""
    return PatchRecipe(
        metrics=tuple(config.metrics),
        cleanings=tuple(config.cleanings),
        ks=tuple(config.ks),
        weights=config.weights,
        temperature=config.temperature,
        linear=tuple(config.linear),
        recipe=linear,
    )


def sources_of(given: Sequence[str] | str, depth: int) -> list[str]:
    """The sources of a backbone; `all` are all its blocks. Raises `UserError`."""
    if isinstance(given, str):
        return [f"block_{block:02d}" for block in range(depth)]
    for source in given:
        Feature(source, "mean").blocks(depth)
    if not given or len(set(given)) < len(given):
        raise UserError(
            f"patches: sources are {list(given)}; name one or more, each once, as in "
            "--sources '[last, block_03]', or all"
        )
    return list(given)


def short(sources: Sequence[str]) -> str:
    """Sources in the name of a file."""
    return "-".join(sources) if len(sources) < 4 else f"{len(sources)}-sources"


def feed(data: DenseShards, config: Namespace, opened: Opened) -> DenseShards:
    """The data with all that the options and the model say of it. Raises `UserError`."""
    data.images, data.seed = opened.images, config.seed
    data.train_images, data.val_images = config.train_images, config.val_images
    data.patches_per_image = config.patches_per_image
    for name in ("train_images", "val_images", "patches_per_image", "together"):
        if config[name] is not None and config[name] < 1:
            raise UserError(f"patches: {name} is {config[name]}; it is 1 or more; set --{name}")
    if config.classes is None and data.names is None:
        raise UserError(
            "patches: nothing says how many classes the masks have; set --classes (and --ignore), "
            "or put their names into classes.json beside the shards"
        )
    data.dense = Dense(
        classes=config.classes or len(data.names or ()),
        ignore=config.ignore,
        net=opened.images.size,
        patch=opened.backbone.spec.patch,
        tile=config.tile,
        size=config.size,
        edge=config.edge,
        label=config.label,
    )
    return data


def joined(results: Sequence[dict[str, Any]], data: DenseShards) -> dict[str, Any]:
    """The results of all groups of sources as one."""
    first = results[0]
    skipped = {
        "train": data.wanted("train") - first["values"]["train_images"],
        "val": data.wanted("val") - first["values"]["images"],
    }
    told = [f"{count} bad {split} images skipped" for split, count in skipped.items() if count]
    told += [
        f"no labelled {'patch' if split == 'train' else 'pixel'} of {', '.join(names)} in {split}"
        for split, names in first["absent"].items()
        if names
    ]
    return {
        **first,
        "values": first["values"] | {"skipped": sum(skipped.values())},
        "table": [row for result in results for row in result["table"]],
        "skipped": skipped,
        "protocol": "; ".join([first["protocol"], f"seed {data.seed}", *told]),
    }


def finish(result: dict[str, Any], out: Path) -> None:
    """Write and show a result."""
    write_result(result, out)
    table = Table(title="patches", title_justify="left")
    for name in ("source", "probe", "cleaning", "metric", "k", "mIoU", "pixels"):
        table.add_column(name, justify="right" if name in ("k", "mIoU", "pixels") else "left")
    for row in result["table"]:
        words = [str(row.get(n, "")) for n in ("source", "probe", "cleaning", "metric", "k")]
        table.add_row(*words, *(f"{100 * row[n]:.2f} %" for n in ("miou", "pixel_top1")))
    Console().print(table)
    show_result(result, out)


def build_parser() -> Parser:
    """The options."""
    parser = probe_parser("patches", __doc__, data=False, images=FED)
    parser.add_class_arguments(DenseShards, "data", skip={"seed"})
    add = parser.add_argument
    add("--sources", type=list[str] | Literal["all"], default=["last"], help="last, block_07, ...")
    add("--norm", type=Norm, default="final", help="the backbone's over each source, or none")
    add("--classes", type=int | None, help="default: as many as classes.json beside the shards has")
    add("--ignore", type=int, default=255, help="the label of pixels that do not count")
    add("--size", type=tuple[int, int] | float | None, help="[height, width], a factor, or as is")
    add("--tile", type=int | None, help="pixels a side, resized to images.size; default: the same")
    add("--edge", type=Edge, default="pad", help="where tiles do not divide the image")
    add("--label", type=PatchLabel, default="nearest", help="of a patch, from its pixels")
    add("--train_images", type=int | None, help="so many, drawn with the seed")
    add("--val_images", type=int | None, help="so many, drawn with the seed")
    add("--patches_per_image", type=int | None, help="so many labelled patches of a train image")
    add("--seed", type=int, default=0, help="of these subsets")
    add("--metrics", type=list[Metric], default=list(DEFAULT.metrics), help="of k-NN")
    add("--cleanings", type=list[str], default=list(DEFAULT.cleanings), help="raw, zscore, top200")
    add("--ks", type=list[int], default=list(DEFAULT.ks), help="numbers of neighbours")
    add("--weights", type=Weights, default=DEFAULT.weights, help="of neighbours' votes")
    add("--temperature", type=float, default=DEFAULT.temperature, help="of exp")
    add("--linear", type=list[str], default=list(DEFAULT.linear), help="cleanings before it; or []")
    parser.add_class_arguments(LinearRecipe, "recipe")
    parser.set_defaults({"recipe.epochs": OF_PATCHES.epochs})
    add("--together", type=int, default=4, help="sources read from one forward; bounds memory")
    add("--pictures", type=int, default=0, help="so many images of val are drawn")
    return parser
