"""What an analysis finds: named numbers over layers, with a confidence interval where there is one.

One shape for all results, so that W&B, CSV, JSON and the report have one writer each.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from contramask.types import UserError


@dataclass(frozen=True)
class Reading:
    """A table of numbers; its axes are named, and so is every place on them.

    Attributes:
        name: a stable key, e.g. `attn/distance`.
        axes: axis -> labels, in the order of the dimensions, e.g. {"layer": ("block_00", ...)}; a
            single number has none.
        value: never NaN: where there is no value, it is 0 and `missing` says so.
        unit: e.g. `px`, `nats`; empty for a plain number.
        about: what it is, in a sentence, with its source.
        low: lower end of the 95 % interval over images, where one was asked for.
        high: its upper end.
        missing: where the analysis has no value, e.g. a layer that does not tell images apart.
    """

    name: str
    axes: Mapping[str, tuple[str, ...]]
    value: Shaped[Tensor, "..."]
    unit: str = ""
    about: str = ""
    low: Float[Tensor, "..."] | None = None
    high: Float[Tensor, "..."] | None = None
    missing: Bool[Tensor, "..."] = field(default_factory=lambda: torch.zeros((), dtype=torch.bool))

    def __post_init__(self) -> None:
        value = self.value.detach().cpu().double()
        shape = tuple(map(len, self.axes.values()))
        assert value.shape == shape, f"{self.name}: {tuple(value.shape)} for the axes {shape}"
        missing = (self.missing.cpu() | ~value.isfinite()).expand(shape)
        for name, table in (("value", value), ("low", self.low), ("high", self.high)):
            if table is not None:
                clean = table.detach().cpu().double().masked_fill(missing, 0.0)
                object.__setattr__(self, name, clean.nan_to_num(0.0))
        object.__setattr__(self, "missing", missing)

    def items(self) -> Iterator[tuple[tuple[str, ...], float]]:
        """The labels of every place and its value, where there is one."""
        places = itertools.product(*self.axes.values())
        flat = zip(places, self.value.flatten().tolist(), self.missing.flatten(), strict=True)
        yield from ((place, value) for place, value, missing in flat if not missing)

    def flat(self) -> dict[str, float]:
        """`attn/distance/block_11` -> value, as W&B and `metrics.jsonl` keep it."""
        return {"/".join((self.name, *place)): value for place, value in self.items()}

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row a place, for a tidy table: name, each axis, value, low, high, unit."""
        low, high = (None if t is None else t.flatten().tolist() for t in (self.low, self.high))
        places = itertools.product(*self.axes.values())
        values, gaps = self.value.flatten().tolist(), self.missing.flatten().tolist()
        for i, place in enumerate(places):
            yield {
                "name": self.name,
                **dict(zip(self.axes, place, strict=True)),
                "value": None if gaps[i] else values[i],
                "low": None if low is None or gaps[i] else low[i],
                "high": None if high is None or gaps[i] else high[i],
                "unit": self.unit,
            }

    def mean(self, axis: str) -> "Reading":
        """The mean over one axis of what is there. Without an interval: means hide its pairs."""
        place = list(self.axes).index(axis)
        there = (~self.missing).double()
        count = there.sum(place)
        value = (self.value * there).sum(place) / count.clamp(min=1)
        rest = {k: v for k, v in self.axes.items() if k != axis}
        return Reading(self.name, rest, value, self.unit, self.about, missing=count == 0)

    def to_json(self) -> dict[str, Any]:
        """Plain values; a place without value is null."""

        def table(t: Tensor | None) -> Any:
            return None if t is None else _nulls(t.tolist(), self.missing.tolist())

        return {
            "name": self.name,
            "unit": self.unit,
            "about": self.about,
            "axes": {k: list(v) for k, v in self.axes.items()},
            "value": table(self.value),
            "low": table(self.low),
            "high": table(self.high),
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "Reading":
        """What `to_json` gave. Raises `UserError` for something else."""
        try:
            low, high = (_tensor(plain[k]) for k in ("low", "high"))
            value = _tensor(plain["value"])
            axes = {k: tuple(v) for k, v in plain["axes"].items()}
            assert value is not None
            return cls(plain["name"], axes, value, plain["unit"], plain["about"], low, high)
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
            raise UserError(
                f"no reading: {str(plain)[:80]!r} ({error!r}); it is not what `contramask analyze` "
                "writes; remove the file and analyse again"
            ) from error


def _nulls(values: Any, missing: Any) -> Any:
    if isinstance(values, list):
        return [_nulls(v, m) for v, m in zip(values, missing, strict=True)]
    return None if missing else values


def _tensor(nested: Any) -> Tensor | None:
    return None if nested is None else torch.tensor(_numbers(nested), dtype=torch.float64)


def _numbers(nested: Any) -> Any:
    if isinstance(nested, list):
        return [_numbers(v) for v in nested]
    return math.nan if nested is None else nested


def by_name(readings: list[Reading]) -> dict[str, Reading]:
    """Readings by their names, which are different."""
    named = {r.name: r for r in readings}
    assert len(named) == len(readings), "two readings of one name"
    return named
