"""The plan of a step: which passes the objectives read, and whether names agree."""

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from contramask.objectives.objective import Objective
from contramask.types import Pass, Spec, UserError

log = logging.getLogger(__name__)


def plan(terms: Mapping[str, Objective]) -> dict[Pass, tuple[Pass, ...]]:
    """The forwards of a step, and the passes that each of them serves.

    Passes that differ in the blocks they ask for are one forward. Teachers come first, so that
    masks could ask them.
    """
    asked = dict.fromkeys(p for term in terms.values() for p in term.passes)
    served: dict[Pass, list[Pass]] = {}
    for reads in sorted(asked, key=lambda p: p.net == "student"):
        served.setdefault(replace(reads, layers=()), []).append(reads)
    return {
        replace(forward, layers=tuple(sorted({i for p in passes for i in p.layers}))): tuple(passes)
        for forward, passes in served.items()
    }


def agree(what: str, given: Any, of: str, needed: Any) -> None:
    # A dict in a later YAML replaces an earlier one whole: a dropped key must not pass in silence.
    if set(given) != set(needed):
        raise UserError(
            f"model.{what} has {sorted(given)}, {of} are {sorted(needed)}: exactly these keys are "
            f"needed; set model.{what}"
        )


def check_depth(terms: Mapping[str, Objective], spec: Spec) -> None:
    """Refuse objectives that all read earlier blocks: what follows would never be trained."""
    layers = {name: term.layer for name, term in terms.items() if term.layer is not None}
    if layers and len(layers) == len(terms):
        deepest = max(layers.values())
        raise UserError(
            f"all objectives read earlier blocks ({layers}): the final norm and the blocks after "
            f"{deepest} of 0 to {spec.depth - 1} would never be trained; leave one objective's "
            "layer out at model.objectives.NAME.init_args, or take a backbone of fewer blocks"
        )


def check_length(max_steps: int) -> int:
    """The number of weight updates. Raises `UserError` where there is none."""
    if max_steps < 1:
        raise UserError(
            f"trainer.max_steps is {max_steps}; training is counted in steps and schedules need "
            "their number; set trainer.max_steps"
        )
    return max_steps


def check_sizes(passes: Collection[Pass], sizes: Mapping[str, tuple[int, ...]], spec: Spec) -> None:
    """Refuse crops that are not whole patches, or not the grid that masks are drawn for.

    Views that nobody reads are told.

    Args:
        passes: of the plan.
        sizes: (height, width) of the crops of each view, in pixels.
        spec: of the backbone.
    """
    if idle := sizes.keys() - {reads.view for reads in passes}:
        log.warning(
            "no objective reads the views %s, which are made all the same; leave them out of "
            "data.views",
            ", ".join(sorted(idle)),
        )
    trained = tuple(n * spec.patch for n in spec.grid)
    for reads in passes:
        height, width = sizes[reads.view]
        where = f"set data.views.{reads.view}.size or the backbone's"
        if height % spec.patch or width % spec.patch:
            raise UserError(
                f"crops of view {reads.view!r} are {height} x {width} pixels, no whole number of "
                f"patches of {spec.patch}; {where} patch_size"
            )
        if reads.mask is not None and (height, width) != trained:
            raise UserError(
                f"crops of view {reads.view!r} are {height} x {width} pixels, mask {reads.mask!r} "
                f"is drawn for {trained[0]} x {trained[1]}; {where} img_size"
            )


def describe(
    parameters: Iterable[nn.Parameter], passes: Iterable[Pass], terms: Mapping[str, Objective]
) -> str:
    """What will be computed in a step and how many parameters there are, in a few lines."""
    count = {True: 0, False: 0}
    for parameter in parameters:
        count[parameter.requires_grad] += parameter.numel()
    lines = [f"{count[True] / 1e6:.1f} M trained parameters, {count[False] / 1e6:.1f} M fixed"]
    lines += [f"pass {p}" for p in passes]
    lines += [f"loss {k}: {type(v).__name__}" for k, v in terms.items()]
    return "\n".join(lines)
