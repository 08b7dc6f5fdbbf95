import os
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from contramask.callbacks import finite
from contramask.callbacks.agreement import Agreement
from contramask.callbacks.finite import FiniteLoss, NonFinite
from contramask.callbacks.preemption import Preemption
from contramask.callbacks.signals import inbox
from contramask.checkpoints import files
from tests.callbacks.small_run import Plan, Small, finish, make, start, steps, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


@pytest.fixture(autouse=True)
def _signals():
    yield
    inbox.restore()


@pytest.fixture
def late(monkeypatch) -> None:
    """As on a GPU: tables are read one update late."""
    monkeypatch.setattr(finite, "Agreement", lambda *, delayed: Agreement(delayed=True))


def weights(module: Small) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.net.named_parameters()}


def stopped(plan: Plan) -> tuple[Small, str]:
    """The module as it was left, and what was said."""
    trainer, module = make(plan)
    with pytest.raises(NonFinite) as info:
        trainer.fit(module)
    assert "\n" not in str(info.value)
    return module, str(info.value)


@pytest.mark.parametrize("optimizer", ["fused", "plain", "sgd"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_nan_is_named_and_changes_nothing(
    tmp_path: Path, optimizer: str, accumulate: int
) -> None:
    plan = Plan(str(tmp_path), every=2, nan_at=7, optimizer=optimizer, accumulate=accumulate)
    module, said = stopped(plan)
    assert said.startswith("update 7: loss of 'small' is NaN; the last good checkpoint is ")
    assert "step-00000006.ckpt; going on from there repeats this" in said
    good = files.load(tmp_path / "checkpoints" / "step-00000006.ckpt")["state_dict"]
    for name, value in weights(module).items():
        assert torch.equal(value, good[f"net.{name}"]), name
    assert files.newest(tmp_path / "checkpoints") == tmp_path / "checkpoints/step-00000006.ckpt"


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("every", [1, 7, 2, 50])
def test_read_late_it_still_changes_nothing_and_is_never_saved(tmp_path: Path, every: int) -> None:
    """Also where the checkpoint is due right after the update that did not happen."""
    module, said = stopped(Plan(str(tmp_path), every=every, nan_at=7, steps=9))
    assert said.startswith("update 7: loss of 'small' is NaN")
    for file in (tmp_path / "checkpoints").glob("*.ckpt"):
        assert files.load(file)["global_step"] <= 6
        assert all(v.isfinite().all() for v in files.load(file)["state_dict"].values())
    assert all(value.isfinite().all() for value in weights(module).values())


@pytest.mark.usefixtures("late")
def test_an_unguarded_optimiser_read_late_spoils_no_checkpoint(tmp_path: Path, monkeypatch) -> None:
    """On a GPU with an optimiser that cannot skip, weights in memory may go, files may not."""
    monkeypatch.setattr(FiniteLoss, "on_before_optimizer_step", lambda *_: None)
    module, said = stopped(Plan(str(tmp_path), every=1, nan_at=7, steps=9, optimizer="sgd"))
    assert said.startswith("update 7: loss of 'small' is NaN")
    assert not all(value.isfinite().all() for value in weights(module).values())
    assert files.load(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 6


@pytest.mark.usefixtures("late")
def test_in_the_last_update_it_is_not_missed(tmp_path: Path) -> None:
    _, said = stopped(Plan(str(tmp_path), every=50, nan_at=5, steps=5))
    assert said.startswith("update 5: ")
    assert files.newest(tmp_path / "checkpoints") is None
    assert "there is no good checkpoint yet" in said


def test_a_gradient_alone(tmp_path: Path) -> None:
    module, said = stopped(Plan(str(tmp_path), nan_at=4, nan_in="gradient"))
    assert said.startswith("update 4: every loss is finite, but the gradient is not; ")
    assert all(value.isfinite().all() for value in weights(module).values())


class Overflow(pl.Callback):
    """Makes a weight infinite, behind everybody's back."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Small, *_: object) -> None:
        if trainer.global_step == 3:
            self.spoil(pl_module)

    def spoil(self, module: Small) -> None:
        module.net[0].weight.data[2, 1] = torch.inf


class OverflowStatistic(Overflow):
    def spoil(self, module: Small) -> None:
        module.net[1].running_var[3] = torch.nan


@pytest.mark.parametrize("culprit", [Overflow, OverflowStatistic])
def test_spoilt_weights_are_not_saved_whoever_asks(tmp_path: Path, culprit: type) -> None:
    trainer, module = make(Plan(str(tmp_path), every=3), culprit())
    with pytest.raises(NonFinite, match="after update 3, so no checkpoint was written"):
        trainer.fit(module)
    with pytest.raises(NonFinite, match="no checkpoint was written"):
        trainer.save_checkpoint(tmp_path / "by-hand.ckpt")
    assert not (tmp_path / "by-hand.ckpt").exists()
    assert files.newest(tmp_path / "checkpoints") is None


def test_an_infinite_mask_is_no_fault(tmp_path: Path, monkeypatch) -> None:
    trainer, module = make(Plan(str(tmp_path), steps=3, every=1))
    module.register_buffer("mask", torch.full((4, 5), -torch.inf))
    trainer.fit(module)
    assert files.load(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 3


def test_a_stop_right_after_a_bad_update_is_no_reason_to_save(tmp_path: Path) -> None:
    _, said = stopped(Plan(str(tmp_path), every=3, nan_at=5, stop_at=5))
    assert said.startswith("update 5: ")
    assert files.load(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 3


def test_the_guard_changes_nothing_in_a_good_run(tmp_path: Path) -> None:
    train(Plan(str(tmp_path / "a")))
    trainer, module = make(Plan(str(tmp_path / "b")))
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, FiniteLoss)]
    (tmp_path / "b").mkdir()
    trainer.fit(module)
    assert steps(tmp_path / "a") == steps(tmp_path / "b")
    one, two = (files.load(tmp_path / x / "checkpoints" / "last.ckpt") for x in "ab")
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name


def test_two_ranks_stop_together_and_name_the_one(tmp_path: Path) -> None:
    port = 31000 + os.getpid() % 900
    plan = Plan(str(tmp_path), ranks=2, port=port, every=2, nan_at=5, nan_rank=1)
    assert finish(start(plan)) == [1, 1]
    for rank in (0, 1):
        assert len(steps(tmp_path, rank)) == 5
        text = (tmp_path / f"log-{rank}.txt").read_text()
        assert "update 5: loss of 'small' is NaN on rank 1; the last good checkpoint is" in text
        assert "step-00000004.ckpt; going on" in text
    assert files.load(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 4


def test_infinite_and_several(tmp_path: Path) -> None:
    trainer, _ = make(Plan(str(tmp_path)))
    (guard,) = [c for c in trainer.callbacks if isinstance(c, FiniteLoss)]
    rows = torch.tensor([1.0, 0.0, 2.0, 2.0, 1.0])
    names = ("contrast", "fine", "reconstruct", finite.SUM, finite.GRADIENT)
    table = Agreement(delayed=False).put(rows, step=8, names=names)
    with pytest.raises(
        NonFinite, match="update 8: loss of 'contrast' is infinite, 'reconstruct' is NaN; there is"
    ):
        guard._judge(trainer, table)
    # Every term finite, but not what the weights make of them.
    table = Agreement(delayed=False).put(
        torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0]), step=8, names=names
    )
    with pytest.raises(NonFinite, match="loss of 'their weighted sum' is infinite"):
        guard._judge(trainer, table)


def test_a_module_that_returns_no_terms(tmp_path: Path, monkeypatch) -> None:
    plain = Small.training_step
    monkeypatch.setattr(
        Small, "training_step", lambda self, b, i: {"loss": plain(self, b, i)["loss"]}
    )
    _, said = stopped(Plan(str(tmp_path), nan_at=2))
    assert said.startswith("update 2: loss of 'their weighted sum' is NaN")


def test_kinds() -> None:
    values = torch.tensor([1.0, -torch.inf, torch.nan, 0.0, torch.inf])
    assert finite._kind(values).tolist() == [0, 1, 2, 0, 1]


def test_the_order_of_savers_does_not_matter(tmp_path: Path) -> None:
    """Preemption saves too; both run after the guard."""
    trainer, _ = make(Plan(str(tmp_path)))
    kinds = [type(c) for c in trainer.callbacks]
    assert kinds.index(FiniteLoss) < kinds.index(Preemption)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", ["fused", "plain"])
def test_on_a_gpu(tmp_path: Path, optimizer: str) -> None:
    plan = Plan(str(tmp_path), every=2, nan_at=7, optimizer=optimizer, accelerator="gpu")
    module, said = stopped(plan)
    assert said.startswith("update 7: loss of 'small' is NaN")
    assert "step-00000006.ckpt" in said
    assert all(v.isfinite().all() for v in weights(module).values()) == (optimizer == "fused")
