"""Bad samples: what is wrong with one, how many there were, and when to stop."""

from collections import Counter, deque

from contramask.errors import UserError


class BadSample(ValueError):
    """A sample that cannot be used. `reason` is one of few fixed words, to count by."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


class Faults:
    """Counts samples and bad ones by reason; stops when too large a fraction is bad."""

    def __init__(self, *, max_bad: float, grace: int) -> None:
        self.max_bad = max_bad
        self.grace = grace if max_bad > 0 else 0
        self.seen = 0
        self.counts: Counter[str] = Counter()
        self.last: deque[str] = deque(maxlen=3)
        self.fresh: dict[str, list[str]] = {}

    def good(self) -> None:
        """One more sample, without fault."""
        self.seen += 1

    def bad(self, reason: str, name: str, detail: str) -> None:
        """One more sample, a bad one. Raises `UserError` when there are too many."""
        self.seen += 1
        self.counts[reason] += 1
        self.fresh.setdefault(reason, []).append(name)
        self.last.append(f"{name}: {detail}")
        count = self.counts.total()
        if count > self.grace and count > self.max_bad * self.seen:
            reasons = ", ".join(f"{n} {r}" for r, n in self.counts.most_common())
            raise UserError(
                f"{count} of {self.seen} samples are bad ({reasons}), more than the allowed "
                f"fraction of {self.max_bad:g}; last: {'; '.join(self.last)}; find them with "
                "`contramask pack --check SHARDS --decode`, or raise data.streaming.max_bad"
            )

    def take(self) -> dict[str, list[str]]:
        """Names of the bad samples since the last call, by reason."""
        fresh, self.fresh = self.fresh, {}
        return fresh
