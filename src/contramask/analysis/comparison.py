"""Portraits to a study: what models have in common, pair by pair."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from contramask.analysis.cka import compare
from contramask.analysis.pairs import agreement, channels
from contramask.analysis.portrait import Portrait
from contramask.analysis.reading import by_name
from contramask.analysis.study import Study
from contramask.types import UserError


def study_of(
    portraits: Mapping[str, Portrait],
    data: dict[str, Any],
    *,
    replicates: int = 0,
    told: Callable[[str, str], None] = lambda a, b: None,
) -> Study:
    """All readings of models and pairs; of one model also its layers with each other.

    What cannot be compared is noted and the rest goes on.

    Args:
        portraits: by the name of the model, over the same images.
        data: what the images were.
        replicates: bootstrap samples for the intervals of pairs.
        told: called with each pair before its turn.
    """
    study = Study({name: p.about for name, p in portraits.items()}, data)
    for name, portrait in portraits.items():
        study.add((name,), portrait.readings)
        study.pictures[name,] = portrait.pictures
        study.points[name,] = portrait.points
        study.notes += [f"{name}: {note}" for note in portrait.notes]
    for a, b in itertools.combinations_with_replacement(portraits, 2):
        told(a, b)
        _pair(study, a, portraits[a], b, portraits[b], replicates)
    _different_images(study)
    return study


def _pair(study: Study, a: str, x: Portrait, b: str, y: Portrait, replicates: int) -> None:
    for way in x.stacks:
        if way not in y.stacks:
            continue
        try:
            study.add((a, b), compare(x.stacks[way], y.stacks[way], replicates=replicates))
        except UserError as error:
            study.notes.append(f"{a} and {b}: {error}")
    if a == b:
        return
    if len(x.stacks and y.stacks) and x.about["depth"] != y.about["depth"]:
        study.notes.append(
            f"{a} has {x.about['depth']} blocks and {b} {y.about['depth']}: layers are compared "
            "with all layers, but there is no same depth"
        )
    if x.predictions and y.predictions:
        try:
            found = agreement(x.predictions, y.predictions, replicates=replicates)
            study.add((a, b), found)
        except UserError as error:
            study.notes.append(f"{a} and {b}: {error}")
    tops = [by_name(p.readings).get("repr/top_channels") for p in (x, y)]
    if tops[0] is not None and tops[1] is not None:
        study.add((a, b), channels(tops[0], tops[1]))


def _different_images(study: Study) -> None:
    """Distances in pixels and counts of patches mean something else for another size."""
    sizes = {name: (about["size"], about["patch"]) for name, about in study.models.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(
            f"{n}: {size} px in patches of {patch}" for n, (size, patch) in sizes.items()
        )
        study.notes.append(
            f"models are fed in different sizes ({told}): attention distance, entropy and "
            "frequencies are of different grids and not to be compared directly"
        )
