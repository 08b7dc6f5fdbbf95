"""When observers look: every so many weight updates, and at the last one."""

import pytorch_lightning as pl


class Cadence:
    """Says once an update whether a look is due.

    Lightning's `on_train_batch_end` comes for every micro-batch, `global_step` moves with the
    weights only; and a resumed run must not look a second time at the update it starts from.

    Args:
        every: updates between two looks; 0: never. The last update of `max_steps` is looked at too;
            a run that is stopped before is not, since its continuation will be.
        first: whether the first update is looked at.
    """

    def __init__(self, every: int, *, first: bool = False):
        self.every, self.first = every, first
        self._seen: int | None = None  # updates done at the last call

    def start(self, trainer: pl.Trainer) -> None:
        """At `on_train_start`."""
        self._seen = trainer.global_step

    def moved(self, trainer: pl.Trainer) -> bool:
        """Whether the weights have moved since the last call. One call a micro-batch."""
        before, self._seen = self._seen, trainer.global_step
        return before != self._seen

    def now(self, trainer: pl.Trainer) -> bool:
        """Whether the update that is done is one to look at."""
        step = trainer.global_step
        last = step == trainer.max_steps
        return bool(self.every) and (step % self.every == 0 or last or (self.first and step == 1))

    def due(self, trainer: pl.Trainer) -> bool:
        """Both. One call a micro-batch."""
        return self.moved(trainer) and self.now(trainer)
