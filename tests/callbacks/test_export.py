"""A backbone is handed out while training runs; a full disk costs the export, not the training."""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import pytorch_lightning as pl

from contramask.callbacks.export import Export
from contramask.checkpoints import export as files
from contramask.checkpoints.export import ExportError, load_backbone
from tests.callbacks.watched_run import network, train

pytestmark = pytest.mark.filterwarnings(
    "ignore:Found .* in eval mode",
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:.isinstance.treespec, LeafSpec.",
)


@pytest.fixture
def disk(monkeypatch) -> SimpleNamespace:
    """A disk that may be full; how often it was written to."""
    disk, save = SimpleNamespace(full=True, writes=0), files.save_file

    def save_file(state, path) -> None:
        disk.writes += 1
        if disk.full:
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(files, "save_file", save_file)
    return disk


def test_training_goes_on_when_the_disk_is_full_and_the_end_is_told(
    tmp_path: Path, disk, caplog
) -> None:
    export = Export(every=2)
    with pytest.raises(
        ExportError, match=r"^.*safetensors could not be written: .*No space left.*same command.*$"
    ):
        train(tmp_path, export, steps=4, accumulate_grad_batches=3)
    warnings = [r.message for r in caplog.records if "no export at step" in r.message]
    assert ["step 2" in warnings[0], "step 4" in warnings[1]] == [True, True]
    assert len(warnings) == 2  # once each, not in every micro-batch
    assert disk.writes == 3  # of the last step again at the end: there may be room now
    assert not list(tmp_path.iterdir())


def test_room_that_comes_back_is_used(tmp_path: Path, disk, caplog) -> None:
    class Cleaner(Export):
        def on_fit_end(self, trainer, pl_module) -> None:
            disk.full = False
            super().on_fit_end(trainer, pl_module)

    train(tmp_path, Cleaner(every=2), steps=4)
    assert caplog.text.count("no export at step") == 2
    assert load_backbone(tmp_path)[1]["step"] == 4


def test_the_last_step_is_written_once(tmp_path: Path, disk) -> None:
    disk.full = False
    train(tmp_path, Export(every=2), steps=4)
    assert disk.writes == 2
    train(tmp_path, Export(every=2), steps=3)
    assert disk.writes == 4
    assert load_backbone(tmp_path)[1]["step"] == 3


def rank(zero: bool, said: str | None = None) -> pl.Trainer:
    """A trainer of one of several ranks, after 3 steps; what the first one says to it."""
    strategy = SimpleNamespace(broadcast=lambda mine: mine if said is None else said)
    return Mock(spec=pl.Trainer, is_global_zero=zero, global_step=3, strategy=strategy)


def test_other_ranks_end_with_the_first_and_write_nothing(tmp_path: Path, disk) -> None:
    first, second = (Export(tmp_path) for _ in range(2))
    with pytest.raises(ExportError) as error:
        first.on_fit_end(rank(True), network())
    said = str(error.value).partition("; the run itself")[0]
    with pytest.raises(ExportError, match="No space left"):
        second.on_fit_end(rank(False, said), network())
    assert disk.writes == 1
    second.on_fit_end(rank(False, ""), network())
