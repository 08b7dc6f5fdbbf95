"""Who watches changes nothing: training is bitwise the same with all observers and without."""

import io
import sys

import numpy as np
import pytest
import torch
from rich.console import Console

from contramask.callbacks.balance import Balance
from contramask.callbacks.pictures import Pictures
from contramask.callbacks.progress import Progress
from contramask.callbacks.throughput import Throughput
from contramask.tracking.jsonl import JSONLLogger, read_metrics
from contramask.tracking.wandb import make_wandb
from tests.callbacks.watched_run import state, train

pytestmark = pytest.mark.filterwarnings(
    "ignore:Found .* in eval mode",  # teachers, on purpose
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:.isinstance.treespec, LeafSpec.",  # Lightning's own
)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_is_bitwise_the_same(tmp_path, monkeypatch, accumulate, precision):
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    given = {"accumulate_grad_batches": accumulate, "precision": precision, "steps": 4}
    # Not Python's own stream: beartype draws from it to choose the items that it checks.
    np.random.seed(1)  # noqa: NPY002
    alone, draw = state(train(tmp_path / "alone", **given)), np.random.rand()  # noqa: NPY002
    run = tmp_path / "watched"
    # W&B itself once: it starts a process.
    once = [make_wandb(run, mode="offline")] if (accumulate, precision) == (2, "32-true") else []
    np.random.seed(1)  # noqa: NPY002
    trainer = train(
        run,
        Pictures(every=1, images=3),
        Balance(every=1),
        Throughput(),
        Progress(console=Console(file=io.StringIO(), force_terminal=True)),
        logger=[JSONLLogger(run), *once],
        **given,
    )
    watched = state(trainer)
    if once:
        sys.modules["wandb"].teardown()  # the process it started
    assert alone.keys() == watched.keys()
    assert [k for k in alone if not torch.equal(alone[k], watched[k])] == []
    assert np.random.rand() == draw  # noqa: NPY002
    # They did watch.
    assert len(list((run / "pictures").iterdir())) == 4 * 2
    assert [r["step"] for r in read_metrics(run) if "speed/step_s" in r] == [2, 4]
    assert sum(any(k.startswith("balance/") for k in r) for r in read_metrics(run)) == 4
