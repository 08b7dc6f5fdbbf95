"""`contramask probe track`: how well frozen patches follow objects through videos."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from jsonargparse import Namespace
from rich.console import Console

from contramask.cli.parser import Parser
from contramask.cli.probing import (
    make_trainer,
    open_model,
    parts_of,
    positional,
    probe_parser,
    show_result,
    write_result,
)
from contramask.data.videos import find_videos
from contramask.probes.features import Norm
from contramask.probes.instances import Similarity
from contramask.probes.track import TrackRecipe
from contramask.training.track import TrackEvaluation, TrackVideos

# Frames have their own sizes, --short_side and --long_side.
FED = ("mean", "std")


def main(argv: Sequence[str]) -> None:
    """Track; print the result and write it beside the run."""
    parser = build_parser()
    config = parser.parse_args(positional(argv))
    recipe = _recipe(config)
    found = find_videos(
        config.videos,
        split=config.set,
        year=config.year,
        resolution=config.resolution,
        categories=config.categories,
        limit=config.limit,
    )
    opened = open_model(config.run, config.images, FED)
    out = config.out or opened.folder / f"{_stem(recipe)}.json"
    folder = parts_of(out)
    evaluation = TrackEvaluation(
        opened.backbone,
        found,
        folder,
        weights=opened.about["backbone"],
        recipe=recipe,
        short_side=config.short_side,
        long_side=config.long_side,
        mean=opened.images.mean,
        std=opened.images.std,
        masks=config.masks,
        batch_size=config.batch_size,
        workers=config.workers,
    )
    trainer = make_trainer(parser.build(config).trainer.as_dict())
    trainer.validate(evaluation, datamodule=TrackVideos(found), verbose=False)
    result = {"probe": "track", **opened.about, **evaluation.result}
    result["protocol"] += f"; set {config.set} of {config.videos.name} at {config.resolution}"
    if trainer.is_global_zero:
        write_result(result, out)
        show_result(result, out)
        if config.masks:
            where = f"masks in {folder}/VIDEO/"
            Console().print(where, highlight=False, markup=False, soft_wrap=True)


def build_parser() -> Parser:
    """The options."""
    parser = probe_parser("track", __doc__, data=False, images=FED)
    add, default = parser.add_argument, TrackRecipe()
    add("--videos", type=Path, required=True, help="a folder in the layout of DAVIS 2017")
    add("--set", type=str, default="val", help="ImageSets/YEAR/SET.txt")
    add("--year", type=str, default="2017")
    add("--resolution", type=str, default="480p", help="the folder of frames and masks")
    add("--categories", type=Path | None, help='a JSON {VIDEO: {"1": CATEGORY}}')
    add("--limit", type=int | None, help="the first so many videos of the set")
    add("--short_side", type=int, default=480, help="of the frames the model sees, in pixels")
    add("--long_side", type=int | None, help="default: the video's shape, rounded down")
    add("--last_frames", type=int, default=default.last_frames, help="beside the first frame")
    add("--radius", type=int, default=default.radius, help="of the window in patches; 0: none")
    add("--topk", type=int, default=default.topk, help="context patches that count for a patch")
    add("--temperature", type=float, default=default.temperature, help="of the affinity")
    add("--deltas", type=tuple[int, ...], default=default.deltas, help="gaps in frames")
    add("--similarity", type=Similarity, default=default.similarity, help="of instances")
    add("--source", type=str, default=default.source, help="last, last4, block_07")
    add("--norm", type=Norm, default=default.norm, help="the backbone's, or none")
    add("--masks", type=bool, default=False, help="palette PNGs in OUT.parts/VIDEO/")
    add("--batch_size", type=int, default=8, help="frames of one forward")
    add("--workers", type=int, default=2, help="threads that read frames")
    return parser


def _recipe(config: Namespace) -> TrackRecipe:
    given = {field.name: config[field.name] for field in fields(TrackRecipe)}
    return TrackRecipe(**{**given, "deltas": tuple(config.deltas)})


def _stem(recipe: TrackRecipe) -> str:
    default = TrackRecipe()
    if (recipe.source, recipe.norm) == (default.source, default.norm):
        return "track"
    return f"track-{recipe.source}-{recipe.norm}"
