"""Numbers of an observer, to callbacks that monitor them and to the loggers at their step."""

from collections.abc import Mapping

import pytorch_lightning as pl


def tell(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    values: Mapping[str, float],
    beside: Mapping[str, float] | None = None,
) -> None:
    """Log what was found after the update that is done.

    To the loggers by hand: Lightning would send a value at the next multiple of log_every_n_steps,
    and the same old value again at every one after that.

    Args:
        trainer: in training.
        module: that is trained.
        values: equal on all ranks; they can be monitored.
        beside: further numbers for the loggers alone.
    """
    for name, value in values.items():
        module.log(name, value, logger=False, on_step=True, on_epoch=False, batch_size=1)
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics({**values, **(beside or {})}, step=trainer.global_step)
            logger.save()
