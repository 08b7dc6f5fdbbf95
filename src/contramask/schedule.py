"""Numbers that move with training, as pure functions of progress.

Progress is the fraction of training done, in [0, 1]; nothing here knows of steps or epochs. With
progress = epoch / epochs this is the continuous schedule of MAE (arXiv:2111.06377) and MoCo v3
(arXiv:2104.02057).
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from contramask.types import UserError

Shape = Literal["cosine", "linear", "constant", "steps"]


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from `start` to `peak`, then a curve from `peak` to `end`.

    Attributes:
        peak: the value at the end of the warm-up.
        end: the value at the end of training.
        start: the value at the beginning, if there is a warm-up.
        warmup: the fraction of training the warm-up takes, in [0, 1).
        shape: the curve after the warm-up. `steps` multiplies by `factor` at each of `milestones`.
        milestones: fractions of training at which `steps` multiplies.
        factor: what `steps` multiplies by.
    """

    peak: float
    end: float = 0.0
    start: float = 0.0
    warmup: float = 0.0
    shape: Shape = "cosine"
    milestones: tuple[float, ...] = ()
    factor: float = 0.1

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            raise UserError(
                f"schedule: shape is {self.shape!r}; there are {', '.join(get_args(Shape))}; "
                "set shape where the schedule is given"
            )
        if not 0 <= self.warmup < 1:
            raise UserError(
                f"schedule: warmup is {self.warmup}; it is a fraction of training in [0, 1), "
                "e.g. 40 of 800 epochs are 0.05; set warmup where the schedule is given"
            )

    def __call__(self, progress: float) -> float:
        """The value at `progress` in [0, 1]."""
        if progress < self.warmup:
            return self.start + (self.peak - self.start) * progress / self.warmup
        if self.shape == "constant":
            return self.peak
        if self.shape == "steps":
            return self.peak * self.factor ** sum(progress >= m for m in self.milestones)
        x = min((progress - self.warmup) / (1 - self.warmup), 1.0)
        if self.shape == "linear":
            return self.peak + (self.end - self.peak) * x
        return self.end + (self.peak - self.end) * 0.5 * (1 + math.cos(math.pi * x))


def at(value: float | Schedule, progress: float) -> float:
    """A number as it is, a schedule at this progress."""
    return value(progress) if isinstance(value, Schedule) else value
