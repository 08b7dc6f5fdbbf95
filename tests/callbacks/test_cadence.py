"""When observers look, against a list by hand."""

from unittest.mock import MagicMock

import pytest
import pytorch_lightning as pl

from contramask.callbacks.cadence import Cadence


@pytest.mark.parametrize(
    ("every", "first", "start", "expected"),
    [
        (3, False, 0, [3, 6, 7]),
        (3, True, 0, [1, 3, 6, 7]),
        (3, False, 3, [6, 7]),  # a resumed run does not look again where it begins
        (1, True, 5, [6, 7]),
        (100, False, 0, [7]),
        (0, True, 0, []),
    ],
)
def test_looks_come_once_an_update(every, first, start, expected):
    cadence, trainer = Cadence(every, first=first), MagicMock(spec=pl.Trainer)
    trainer.global_step, trainer.max_steps = start, 7
    cadence.start(trainer)
    found = []
    for micro_batch in range(1, 2 * (7 - start) + 1):  # two of them an update
        trainer.global_step = start + micro_batch // 2
        if cadence.due(trainer):
            found.append(trainer.global_step)
    assert found == expected
