"""A clock that tells training from waiting for data and from what other callbacks do."""

import time
from typing import Any

from pytorch_lightning.profilers import Profiler

_FETCH = "[_TrainingEpochLoop].train_dataloader_next"
_VALIDATION = ".on_validation_model_zero_grad"  # the first thing of a validation inside training


class Clock(Profiler):
    """Listens to the names the trainer gives its actions; passes them on to the profiler set."""

    def __init__(self, inner: Profiler, *, own: str):
        super().__init__()
        self.inner, self._own = inner, f"[Callback]{own}."
        self.waited = self.aside = 0.0  # seconds for data, seconds of others
        self._fetching = self._since = 0.0
        self._depth = 0
        self._validating = False

    @classmethod
    def listen(cls, trainer: Any, *, own: str) -> "Clock":
        """Put a clock between a trainer and its profiler; `own`: the callback whose time counts."""
        clock = cls(trainer.profiler, own=own)
        trainer.profiler = clock
        return clock

    def leave(self, trainer: Any) -> None:
        """Give the trainer its profiler back."""
        trainer.profiler = self.inner

    def restart(self) -> None:
        """Count from 0."""
        self.waited = self.aside = 0.0

    def start(self, action_name: str) -> None:
        """An action begins."""
        if action_name == _FETCH:
            self._fetching = time.perf_counter()
        elif self._other(action_name):
            self._enter()
        elif action_name.endswith(_VALIDATION):
            self.validation(True)
        self.inner.start(action_name)

    def stop(self, action_name: str) -> None:
        """An action ends."""
        self.inner.stop(action_name)
        if action_name == _FETCH:
            self.waited += time.perf_counter() - self._fetching
        elif self._other(action_name):
            self._leave()

    def validation(self, begins: bool) -> None:
        """A validation begins or ends."""
        if begins != self._validating:
            self._validating = begins
            self._enter() if begins else self._leave()

    def summary(self) -> str:
        """That of the profiler set."""
        return self.inner.summary()

    def describe(self) -> None:
        """As the profiler set does."""
        self.inner.describe()

    def _other(self, action: str) -> bool:
        return action.startswith("[Callback]") and not action.startswith(self._own)

    def _enter(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._since = time.perf_counter()

    def _leave(self) -> None:
        # The first end may belong to an action that began before this clock was set.
        if self._depth == 1:
            self.aside += time.perf_counter() - self._since
        self._depth = max(self._depth - 1, 0)
