"""The last numbers of a run, and what is said of them: pure bookkeeping, for `watchdog`."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

KEPT, RECENT = 64, 10  # values of a key: remembered, and averaged where one alone is noisy

Kind = Literal["collapse", "warning", "remark"]


class History:
    """The last values of each key with their steps, and the greatest value there ever was."""

    def __init__(self) -> None:
        self._rows: dict[str, list[tuple[int, float]]] = {}
        self._peaks: dict[str, float] = {}

    def note(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add numbers of a step. What is not finite is left out: it is FiniteLoss's affair."""
        for key, value in numbers.items():
            if math.isfinite(value):
                rows = self._rows.setdefault(key, [])
                rows.append((step, value))
                del rows[:-KEPT]
                self._peaks[key] = max(value, self._peaks.get(key, value))

    def keys(self, prefix: str) -> list[str]:
        """The keys that begin so, sorted."""
        return sorted(key for key in self._rows if key.startswith(prefix))

    def values(self, key: str) -> list[float]:
        """The last values, oldest first; empty if there is none."""
        return [value for _, value in self._rows.get(key, [])]

    def last(self, key: str) -> float | None:
        """The newest value."""
        values = self.values(key)
        return values[-1] if values else None

    def peak(self, key: str) -> float | None:
        """The greatest value of the run, also of those forgotten since."""
        return self._peaks.get(key)

    def mean(self, key: str, least: int = RECENT) -> float | None:
        """The mean of the last values; None while there are fewer than `least`."""
        values = self.values(key)[-RECENT:]
        return sum(values) / len(values) if len(values) >= least else None

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        rows = {key: [list(row) for row in rows] for key, rows in self._rows.items()}
        return {"rows": rows, "peaks": dict(self._peaks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        rows = state["rows"].items()
        self._rows = {key: [(int(step), float(v)) for step, v in old] for key, old in rows}
        self._peaks = dict(state["peaks"])


class Finding(NamedTuple):
    """What a rule sees: True, it is there; False, it is not; None, too near or too few to tell."""

    shown: bool | None = None
    seen: str = ""  # the numbers, in words; empty: there was nothing to judge


@dataclass(frozen=True)
class Rule:
    """From the numbers to a finding, with what to say of it.

    Attributes:
        name: of the diagnosis, for curves and files.
        judge: the rule itself.
        means: what the finding means.
        fix: what the field does about it, with its source.
        kind: `collapse` may stop a training, a `remark` is no fault by itself.
        patience: looks in a row that must agree before anything is said.
        early: also judged during the warm-up, when features and losses are not settled.
    """

    name: str
    judge: Callable[[History], Finding]
    means: str
    fix: str
    kind: Kind = "collapse"
    patience: int = 3
    early: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """Something that sets in or ends."""

    step: int  # updates done
    name: str
    event: Literal["begins", "ends"]
    since: int  # the look at which it set in
    kind: Kind
    seen: str
    means: str
    fix: str

    @property
    def title(self) -> str:
        """A few words."""
        return f"{self.name} {self.event}"

    @property
    def text(self) -> str:
        """All of it in plain language."""
        if self.event == "ends":
            return f"update {self.step}: {self.name}, since update {self.since}, ends: {self.seen}"
        return (
            f"update {self.step}: {self.name}: {self.seen}. What it means: {self.means}. "
            f"What helps: {self.fix}"
        )


@dataclass
class Chart:
    """Which diagnoses stand. One sets in, and ends, after `patience` looks in a row that say so."""

    standing: dict[str, int] = field(default_factory=dict)  # since which step
    streaks: dict[str, int] = field(default_factory=dict)  # looks that speak against what stands
    judged: dict[str, float] = field(default_factory=dict)  # at the last look: 1 stands, 0 does not

    def look(
        self, rules: Iterable[Rule], history: History, *, step: int, settled: bool
    ) -> list[Diagnosis]:
        """What sets in or ends now.

        Args:
            rules: of this run.
            history: its numbers, those of now included.
            step: updates done.
            settled: the warm-up is over.
        """
        told, self.judged = [], {}
        for rule in rules:
            finding = rule.judge(history) if settled or rule.early else Finding()
            stands = rule.name in self.standing
            against = finding.shown is not None and finding.shown != stands
            streak = self.streaks.get(rule.name, 0) + 1 if against else 0
            if streak >= rule.patience:
                told.append(self._turn(rule, finding, step))
                streak = 0
            self.streaks[rule.name] = streak
            if finding.seen:
                self.judged[rule.name] = float(rule.name in self.standing)
        return told

    def _turn(self, rule: Rule, finding: Finding, step: int) -> Diagnosis:
        event: Literal["begins", "ends"] = "begins" if finding.shown else "ends"
        since = step if finding.shown else self.standing.pop(rule.name)
        if finding.shown:
            self.standing[rule.name] = step
        words = (finding.seen, rule.means, rule.fix)
        return Diagnosis(step, rule.name, event, since, rule.kind, *words)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"standing": dict(self.standing), "streaks": dict(self.streaks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.standing, self.streaks = dict(state["standing"]), dict(state["streaks"])
