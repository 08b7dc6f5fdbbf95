"""What is known of a training while it goes on, and how it is said."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text

_LOSS, _RESULT, _SPEED = "train/loss", "val/", "speed/images_per_s"
_FRACTIONS = ("top1", "top5", "accuracy")  # shown in per cent


@dataclass
class Standing:
    """What is known of a training, and how it is said."""

    step: int = 0  # weight updates done
    total: int | None = None
    images_per_s: float | None = None
    measured: bool = False  # that; else it is an estimate
    left: float | None = None  # seconds
    took: float = 0.0  # seconds since this process began to train
    loss: float | None = None
    terms: dict[str, float] = field(default_factory=dict)  # of the loss, by objective
    results: dict[str, float] = field(default_factory=dict)  # of probes, the last ones
    results_step: int = 0
    note: str = ""  # what keeps the steps from going on

    def read(self, metrics: Mapping[str, Any]) -> None:
        """Take what is shown from the metrics of the trainer: a wait for the device."""
        values = {k: float(v) for k, v in metrics.items() if k.startswith((_LOSS, _RESULT, _SPEED))}
        self.loss = values.get(_LOSS)
        if _SPEED in values:
            self.images_per_s, self.measured = values[_SPEED], True
        terms = {k: v for k, v in values.items() if k.startswith(f"{_LOSS}/")}
        self.terms = {k.removeprefix(f"{_LOSS}/"): v for k, v in terms.items()}
        results = {k.removeprefix(_RESULT): v for k, v in values.items() if k.startswith(_RESULT)}
        if results != self.results:
            self.results, self.results_step = results, self.step

    def counts(self) -> str:
        """Steps done and steps to do."""
        if self.total is None:
            return f"step {self.step:,}"
        return f"step {self.step:,}/{self.total:,} ({self.step / max(self.total, 1):.1%})"

    def speed(self) -> str:
        """Images a second, and how long it will take."""
        parts = [] if self.images_per_s is None else [f"{_digits(self.images_per_s)} images/s"]
        if self.step == self.total:
            parts.append(f"{timedelta(seconds=round(self.took))} taken")
        elif self.left is not None:
            parts.append(f"{timedelta(seconds=round(self.left))} left")
        return "  ".join(parts)

    def losses(self) -> list[tuple[str, str]]:
        """The loss, and its terms if there is more than one."""
        if self.loss is None:
            return []
        terms = self.terms if len(self.terms) > 1 else {}
        return [("loss", f"{self.loss:.4f}"), *((k, f"{v:.4f}") for k, v in terms.items())]

    def found(self) -> list[tuple[str, str]]:
        """The last results of probes."""
        return [
            (k, f"{v:.1%}" if k.endswith(_FRACTIONS) else f"{v:.4g}")
            for k, v in sorted(self.results.items())
        ]

    def line(self) -> str:
        """All of it in one line."""
        parts = [self.counts(), self.speed(), joined(self.losses()), joined(self.found())]
        return "  |  ".join(part for part in parts if part)

    def __rich__(self) -> RenderableType:
        """All of it in up to three lines, for a terminal."""
        # Columns of one width, so that nothing moves but the bar.
        widest = 2 * len(f"{self.total or self.step:,}") + len("step / (100.0%)")
        top = Table.grid(padding=(0, 2, 0, 0), expand=True)
        top.add_column(ratio=1)
        top.add_column(no_wrap=True, min_width=widest)
        top.add_column(no_wrap=True, min_width=len("10,000 images/s  00:00:00 left"))
        bar = Bar(total=self.total, completed=self.step, pulse=self.total is None)
        top.add_row(bar, Text(self.counts()), Text(self.note or self.speed(), style="cyan"))
        rows: list[RenderableType] = [top]
        if self.loss is not None:
            rows.append(_coloured(self.losses()))
        if self.results:
            place = Text(f"  at step {self.results_step:,}", style="dim")
            rows.append(_coloured(self.found()).append(place))
        return Group(*rows)


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def joined(pairs: list[tuple[str, str]]) -> str:
    """Names and values in one line."""
    return "  ".join(f"{name} {value}" for name, value in pairs)


def _coloured(pairs: list[tuple[str, str]]) -> Text:
    text = Text()
    for name, value in pairs:
        text.append(f"{name} ", style="dim").append(f"{value}  ", style="bold")
    return text
