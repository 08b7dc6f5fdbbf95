"""Checkpoints of Lightning modules that hold a ViT of timm somewhere: lightly, solo-learn, own."""

import re
from dataclasses import dataclass

from contramask.checkpoints.layouts.layout import MARK, Layout, Net, State

AVERAGE = re.compile(r"(^|[._])(teacher|momentum|ema|target|key)([._]|$)")


def roots(tensors: State) -> list[str]:
    """Prefixes of all ViTs in a file, those called a backbone or encoder first, then short ones."""
    found = [k.removesuffix(MARK) for k in tensors if k.endswith(f".{MARK}")]
    return sorted(found, key=lambda p: (not re.search("backbone|encoder", p), len(p), p))


@dataclass(frozen=True)
class Wrapped(Layout):
    """The networks are looked for: the average has its name from what it is."""

    def root(self, tensors: State, net: Net) -> str | None:
        teacher = net == "teacher"
        fitting = [p for p in roots(tensors) if bool(AVERAGE.search(p)) == teacher]
        return fitting[0] if fitting else None


LIGHTNING = Wrapped(
    name="lightning",
    holds=lambda tensors: bool(roots(tensors)),
    inside=("head.", "fc.", "mask_token"),
    beside=(
        *(
            f"{net}{part}."
            for net in ("", "student_", "teacher_", "momentum_", "online_", "target_")
            for part in (
                "backbone",
                "encoder",
                "head",
                "projection_head",
                "prediction_head",
                "projector",
                "predictor",
                "classifier",
                "decoder",
                "model",
                "vit",
            )
        ),
        *("student.", "teacher.", "criterion.", "loss.", "dino_loss_func.", "dino_loss."),
        *("momentum_updater.", "knn.", "queue", "queue_ptr", "queue_y", "online_linear_head."),
    ),
)
