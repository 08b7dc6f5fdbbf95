"""The precision of a trainer in the words of a protocol."""

import pytorch_lightning as pl


def in_words(trainer: pl.Trainer) -> str:
    """The end of a protocol line: `, precision bf16-mixed`; nothing for float32."""
    return "" if trainer.precision == "32-true" else f", precision {trainer.precision}"
