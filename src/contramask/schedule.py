"""Numbers that move with training, as pure functions of progress.

Progress is the fraction of training done, in [0, 1]; nothing here knows of steps or epochs. With
progress = epoch / epochs this is the continuous schedule of MAE (arXiv:2111.06377) and MoCo v3
(arXiv:2104.02057). The arrays that DINO, iBOT, DINOv2 and BEiT fill beforehand reach the peak at
the last of their W warm-up steps and stay there for the next: of T steps, warmup = (W - 1) / T and
hold = 1 / T.
"""

import math
from dataclasses import dataclass
from typing import Literal

from contramask.errors import UserError, need_one_of

Shape = Literal["cosine", "linear", "constant", "steps"]


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from `start` to `peak`, then a curve from `peak` to `end`.

    Attributes:
        peak: the value at the end of the warm-up.
        end: the value at the end of training.
        start: the value at the beginning, if there is a warm-up.
        warmup: the fraction of training the warm-up takes, in [0, 1).
        hold: the fraction of training at the peak after the warm-up.
        shape: the curve after the warm-up. `steps` multiplies by `factor` at each of `milestones`.
        milestones: fractions of training at which `steps` multiplies.
        factor: what `steps` multiplies by.
        stairs: the value moves this many times in training and stays in between: with the number
            of epochs, once an epoch (DINO's teacher temperature). None: at every step.
    """

    peak: float
    end: float = 0.0
    start: float = 0.0
    warmup: float = 0.0
    hold: float = 0.0
    shape: Shape = "cosine"
    milestones: tuple[float, ...] = ()
    factor: float = 0.1
    stairs: int | None = None

    def __post_init__(self) -> None:
        need_one_of(self.shape, Shape, "schedule: shape", "shape where the schedule is given")
        if not 0 <= self.warmup <= self.warmup + self.hold < 1:
            raise UserError(
                f"schedule: warmup is {self.warmup} and hold {self.hold}; they are fractions of "
                "training, not negative and below 1 together, e.g. 40 of 800 epochs are 0.05; set "
                "them where the schedule is given"
            )

    def __call__(self, progress: float) -> float:
        """The value at `progress` in [0, 1]."""
        if self.stairs is not None:
            # What is left of the step's own fraction is rounding: 0.3 of 10 stairs is the third.
            progress = math.floor(progress * self.stairs + 1e-9) / self.stairs
        if progress < self.warmup:
            return self.start + (self.peak - self.start) * progress / self.warmup
        if self.shape == "constant":
            return self.peak
        if self.shape == "steps":
            return self.peak * self.factor ** sum(progress >= m for m in self.milestones)
        begin = self.warmup + self.hold
        x = min(max(progress - begin, 0.0) / (1 - begin), 1.0)
        if self.shape == "linear":
            return self.peak + (self.end - self.peak) * x
        return self.end + (self.peak - self.end) * (0.5 * (1 + math.cos(math.pi * x)))


def at(value: float | Schedule, progress: float) -> float:
    """A number as it is, a schedule at this progress."""
    return value(progress) if isinstance(value, Schedule) else value
