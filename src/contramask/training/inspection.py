"""Pictures of what a step sees and makes."""

from collections.abc import Callable, Mapping

from torch import Tensor

from contramask.objectives.objective import Feats, Objective
from contramask.types import Batch, Step


def draw(
    encode: Callable[[Batch, Step], Feats],
    terms: Mapping[str, Objective],
    batch: Batch,
    step: Step,
    images: int,
) -> dict[str, dict[str, Tensor]]:
    """The views of the first images of a batch, and what each objective draws of them."""
    part = Batch(
        views={k: v[:, :images] for k, v in batch["views"].items()},
        label=batch["label"][:images],
        position=batch["position"],
    )
    feats = encode(part, step)
    drawn = {name: term.picture(feats, part, step) for name, term in terms.items()}
    shown = {f"{k} {i}": v[i] for k, v in part["views"].items() for i in range(len(v))}
    return {"views": shown, **{k: v for k, v in drawn.items() if v}}
