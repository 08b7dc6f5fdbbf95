"""The folder of the stored features that a command reads: one that stays, or one of its own."""

import shutil
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytorch_lightning as pl

from contramask.cli.parser import Parser
from contramask.cli.probing import Opened
from contramask.training.knn import Nothing
from contramask.types import Batch


def add_cache(parser: Parser) -> None:
    """`--cache`."""
    parser.add_argument(
        "--cache",
        type=str | None,
        help="where features are kept; default RUN/probes/features; none: nowhere",
    )


@contextmanager
def cached(cache: str | None, opened: Opened, trainer: pl.Trainer) -> Generator[Path]:
    """The folder of the features; `none`: one of this command alone, removed at its end."""
    if cache is None or cache.lower() != "none":
        yield Path(cache) if cache else opened.folder / "features"
        return
    folder = opened.folder / agreed(trainer, f"features-{uuid.uuid4().hex[:12]}")
    try:
        yield folder
    finally:
        if trainer.is_global_zero:
            shutil.rmtree(folder, ignore_errors=True)


def agreed(trainer: pl.Trainer, text: str) -> str:
    """What the first rank brings, on all ranks."""
    if trainer.world_size == 1:
        return text
    agreement = _Agreement(text)
    # There are no ranks before the trainer has begun something.
    trainer.validate(agreement, dataloaders=Nothing(), verbose=False)
    return agreement.text


class _Agreement(pl.LightningModule):
    def __init__(self, text: str):
        super().__init__()
        self.text = text

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        raise AssertionError("there is no batch")

    def on_validation_epoch_end(self) -> None:
        # Where ranks are forked from this process, all have its text, and so has it.
        self.text = self.trainer.strategy.broadcast(self.text)
