"""Whether the terms of a hybrid pull together, now and then."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import pytorch_lightning as pl
import torch
from torch import Tensor

from contramask.callbacks.cadence import Cadence
from contramask.callbacks.online_probes import undisturbed
from contramask.types import Batch, UserError


@runtime_checkable
class Balanced(Protocol):
    """A training module that can weigh the terms of its loss against each other."""

    def balance(self, batch: Batch) -> Mapping[str, Tensor]: ...


class Balance(pl.Callback):
    """Logs norms and cosines of the terms' gradients on the backbone, under `balance/`.

    It takes the batch at hand through the networks once more, and back once for each term, so one
    report costs about as much as two updates of a hybrid of two. Nothing of it reaches training,
    which is bitwise the same with it and without it. A loss of one term is not reported.

    Args:
        every: updates between two reports; 0: never.
    """

    def __init__(self, *, every: int = 500):
        if every < 0:
            raise UserError(
                f"balance: every is {every}; it is at least 0 updates (0: never); set balance.every"
            )
        self.every = every
        self._cadence = Cadence(every)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Know where training begins."""
        self._cadence.start(trainer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Report, if it is time and a weight update is done. Every rank takes part."""
        if not self._cadence.due(trainer) or not isinstance(pl_module, Balanced):
            return
        buffers = {name: b.clone() for name, b in pl_module.named_buffers()}
        with (
            undisturbed(pl_module.device),
            torch.enable_grad(),
            trainer.precision_plugin.forward_context(),
        ):
            found = pl_module.balance(batch)
        for name, value in buffers.items():  # the statistics of batch norms
            pl_module.get_buffer(name).copy_(value)
        if not found:
            return
        numbers = torch.stack(list(found.values())).tolist()
        shown = {f"balance/{k}": n for k, n in zip(found, numbers, strict=True)}
        for logger in trainer.loggers:
            logger.log_metrics(shown, step=trainer.global_step)
