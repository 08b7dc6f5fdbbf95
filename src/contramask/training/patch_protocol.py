"""The line that says how patches were probed."""

from collections.abc import Mapping

from contramask.data.dense import Dense
from contramask.functional.cleaning import Cleaning
from contramask.probes.features import Norm
from contramask.probes.patches import PatchRecipe, SourceProbe

_EDGE = {
    "pad": "filled up with void at the right and the bottom",
    "overlap": "the last ones moved back to the edge",
}
_LABEL = {
    "nearest": "that of the pixel at its middle",
    "majority": "that of most of its pixels",
}


def protocol(
    dense: Dense, recipe: PatchRecipe, probe: SourceProbe, norm: Norm, counts: Mapping[str, float]
) -> str:
    """All that is needed to redo the numbers of an evaluation."""
    tiling = dense.tiling
    size = "images as they are"
    if isinstance(dense.size, tuple):
        size = f"images resized to {dense.size[0]} x {dense.size[1]}"
    elif dense.size is not None:
        size = f"images resized by {dense.size:g}"
    parts = [
        f"{counts['train_images']} train images with {counts['train_patches']} labelled patches, "
        f"{counts['images']} val images",
        f"{size}, tiles of {tiling.tile} pixels {_EDGE[dense.edge]}, resized to {dense.net} "
        f"(bicubic, antialiased), {tiling.grid} x {tiling.grid} patches each",
        f"label of a patch: {_LABEL[dense.label]}, void left out",
        "tokens after the final norm" if norm == "final" else "tokens without the final norm",
        *_knn(recipe),
        *([] if not probe.heads else [next(iter(probe.heads.values())).protocol]),
        f"mIoU over {dense.classes} classes (label {dense.ignore} ignored) of all val pixels at "
        "the masks' own size, each with the class of its patch; classes in neither masks nor "
        "predictions are left out",
    ]
    return "; ".join(parts)


def _knn(recipe: PatchRecipe) -> list[str]:
    if not (recipe.metrics and recipe.cleanings and recipe.ks):
        return []
    cleanings = ", ".join(Cleaning.parse(word).about() for word in recipe.cleanings)
    ks = "/".join(map(str, recipe.ks))
    votes = "uniform votes, of equals the nearest's class"
    if recipe.weights == "exp" and "cosine" in recipe.metrics:
        votes = f"votes of cosine weighted by exp(cosine / {recipe.temperature:g}), others uniform"
    return [f"{ks}-NN among all of them by {', '.join(recipe.metrics)} ({votes}), with {cleanings}"]
