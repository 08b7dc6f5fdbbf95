"""J and F of the objects of a video, and what they come to over frames (arXiv:1704.00675)."""

from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from contramask.functional.contours import contour_accuracy, region_similarity
from contramask.probes.instances import rates


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


def summary(tables: dict[str, Any], skipped: dict[str, str]) -> dict[str, Any]:
    """What a set of videos comes to.

    Args:
        tables: of each video what `track` returns.
        skipped: videos that were left out, and why.

    Returns:
        `values`; means are over all objects of all videos. `videos`, `instances`, `skipped`.
    """
    objects = [scores for table in tables.values() for scores in table["objects"].values()]
    values: dict[str, float] = {}
    if objects:
        for name in objects[0]:
            mean = sum(scores[name] for scores in objects) / len(objects)
            key = {"mean": "rate", "recall": "recall_rate", "decay": "decay"}
            letter, _, what = name.partition("_")
            values[f"{letter}_{key[what]}"] = mean
        values["jf_rate"] = (values["j_rate"] + values["f_rate"]) / 2
    matched: dict[str, dict[str, float]] = {}
    for table in tables.values():
        for delta, counts in table["instances"].items():
            sums = matched.setdefault(delta, dict.fromkeys(counts, 0.0))
            for name, count in counts.items():
                sums[name] += count
    values |= rates(matched)
    values = {name: round(value, 6) for name, value in values.items()}
    values |= {
        "videos": len(tables),
        "objects": len(objects),
        "frames": sum(table["scored"] for table in tables.values()),
        "unscored_videos": sum(not table["scored"] for table in tables.values()),
        "lost_objects": sum(table["lost"] for table in tables.values()),
        "skipped_videos": len(skipped),
    }
    return {"values": values, "videos": tables, "instances": matched, "skipped": skipped}
