"""J and F of the objects of a video, and what they come to over frames (arXiv:1704.00675)."""

from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from contramask.functional.contours import contour_accuracy, region_similarity


def agreement(
    found: UInt8[Tensor, "h w"], truth: UInt8[Tensor, "h w"], objects: tuple[int, ...]
) -> dict[Literal["j", "f"], Float[Tensor, " O"]]:
    """J and F of every object in one frame."""
    indices = torch.tensor(objects, device=found.device)[:, None, None]
    pair = (found == indices, truth.to(found.device) == indices)
    return {"j": region_similarity(*pair).cpu(), "f": contour_accuracy(*pair).cpu()}


def statistics(scores: Float[Tensor, " T"]) -> dict[str, float]:
    """Of one object over frames: mean, recall (frames above 0.5) and decay, as DAVIS has them.

    Decay is the mean of the first quarter of the frames less that of the last; quarters share the
    frames at their ends.
    """
    count = len(scores)
    ends = [int(1 + i * (count - 1) / 4 + 0.5) - 1 for i in range(5)]  # half is rounded up
    quarter = [scores[a : b + 1].mean() for a, b in ((ends[0], ends[1]), (ends[3], ends[4]))]
    return {
        "mean": scores.mean().item(),
        "recall": (scores > 0.5).double().mean().item(),
        "decay": (quarter[0] - quarter[1]).item(),
    }


def scores_of(scores: dict[str, list[Tensor]], objects: tuple[int, ...]) -> dict[str, Any]:
    """`scored`, a number of frames, and `objects`: index -> `statistics` of J and F.

    The last frame with a mask is left out, as the first one is: DAVIS scores neither.

    Args:
        scores: for j and f the `agreement` of every frame with a mask but the first.
        objects: their indices.
    """
    scored = max(0, len(scores["j"]) - 1)
    if not scored:
        return {"scored": 0, "objects": {}}
    tables = {name: torch.stack(rows[:-1]) for name, rows in scores.items()}  # (T, O)
    return {
        "scored": scored,
        "objects": {
            str(index): {
                f"{name}_{key}": value
                for name, table in tables.items()
                for key, value in statistics(table[:, o]).items()
            }
            for o, index in enumerate(objects)
        },
    }
