import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from contramask.callbacks.checkpoint import REPORTED, Checkpoints
from contramask.callbacks.online_probes import OnlineProbes
from contramask.callbacks.preemption import Preempted
from contramask.callbacks.signals import inbox
from contramask.checkpoints import files
from contramask.types import UserError
from tests.callbacks import probed_run
from tests.callbacks.small_run import Plan, finish, make, start, steps, train, wait_for

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


@pytest.fixture(autouse=True)
def _signals():
    yield
    inbox.restore()


def last(root: Path) -> dict[str, Any]:
    return files.load(root / "checkpoints" / "last.ckpt")


def assert_same_end(a: Path, b: Path) -> None:
    """Weights, statistics and optimiser are bitwise equal."""
    one, two = last(a), last(b)
    assert one["global_step"] == two["global_step"]
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name
    states = [x["optimizer_states"][0]["state"] for x in (one, two)]
    assert states[0].keys() == states[1].keys()
    for index, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(value, states[1][index][name]), (index, name)


def names(root: Path) -> list[str]:
    return sorted(p.name for p in (root / "checkpoints").glob("*.ckpt"))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("accumulate", "stop"), [(1, 7), (3, 5), (3, 4)])
def test_stop_and_go_on_is_the_straight_run(
    tmp_path: Path, workers: int, accumulate: int, stop: int
) -> None:
    plan = Plan(str(tmp_path / "a"), steps=9, accumulate=accumulate, workers=workers)
    train(plan)
    again = Plan(**{**vars(plan), "root": str(tmp_path / "b"), "stop_at": stop})
    with pytest.raises(Preempted):
        train(again)
    assert last(tmp_path / "b")["global_step"] == stop
    train(again)
    assert steps(tmp_path / "a") == steps(tmp_path / "b")
    assert len(steps(tmp_path / "a")) == 9 * accumulate
    assert_same_end(tmp_path / "a", tmp_path / "b")


def test_which_files_are_kept(tmp_path: Path) -> None:
    train(Plan(str(tmp_path), steps=11, every=2, keep=3))
    kept = ["step-00000006.ckpt", "step-00000008.ckpt", "step-00000010.ckpt"]
    assert names(tmp_path) == ["last.ckpt", *kept]
    assert last(tmp_path)["global_step"] == 11  # the end is saved although it is not periodic
    # After a resume the files of the earlier start are looked after.
    train(Plan(str(tmp_path), steps=14, every=2, keep=2))
    assert names(tmp_path) == ["last.ckpt", "step-00000012.ckpt", "step-00000014.ckpt"]
    folder = tmp_path / "checkpoints"
    assert (folder / "last.ckpt").samefile(folder / "step-00000014.ckpt")
    assert len(list(folder.iterdir())) == 6  # each with its sidecar, and nothing else


@pytest.mark.parametrize(("keep", "count"), [(0, 0), (None, 5)])
def test_keep_none_or_all(tmp_path: Path, keep: int | None, count: int) -> None:
    train(Plan(str(tmp_path), steps=5, every=1, keep=keep))
    assert len(names(tmp_path)) == 1 + count
    assert last(tmp_path)["global_step"] == 5


def test_files_of_later_steps_are_not_counted(tmp_path: Path) -> None:
    """Passed over as damaged at a resume, they must not push good ones out."""
    train(Plan(str(tmp_path), steps=6, every=2, keep=2))
    folder = tmp_path / "checkpoints"
    for name in ("last.ckpt", "step-00000006.ckpt"):
        (folder / name).write_bytes(b"")
    train(Plan(str(tmp_path), steps=5, every=1, keep=2))
    assert names(tmp_path) == [
        "last.ckpt",
        "step-00000004.ckpt",
        "step-00000005.ckpt",
        "step-00000006.ckpt",
    ]


def test_old_torn_files_are_swept(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "last.ckpt.tmp.77").write_bytes(b"torn")
    train(Plan(str(tmp_path), steps=1))
    assert names(tmp_path) == ["last.ckpt"]
    assert not list(folder.glob("*.tmp.*"))


def test_saves_fall_between_updates(tmp_path: Path) -> None:
    train(Plan(str(tmp_path), steps=5, every=1, keep=None, accumulate=3))
    for step in range(1, 6):
        saved = files.load(tmp_path / "checkpoints" / f"step-{step:08d}.ckpt")
        progress = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
        assert (saved["global_step"], progress["processed"]) == (step, 3 * step)


class SavesTooEarly(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        (callback,) = [c for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoints)]
        if trainer.global_step == 2:
            callback.save(trainer, again=True)


def test_inside_an_accumulation_window_nobody_saves(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="inside an accumulation window"):
        train(Plan(str(tmp_path), accumulate=3), SavesTooEarly())
    assert last(tmp_path)["global_step"] == 2
    assert len(steps(tmp_path)) == 7  # six made two updates, which was saved; not the seventh


def scored(plan: Plan, scores: dict[int, float], **settings: Any) -> Checkpoints:
    """Train, with these outcomes of validation by step."""
    trainer, module = make(plan, monitor="score", **settings)
    module.scores = scores
    trainer.fit(module, ckpt_path=files.newest(Path(plan.root) / "checkpoints"))
    callback = trainer.checkpoint_callbacks[1]
    assert isinstance(callback, Checkpoints)
    return callback


@pytest.mark.parametrize(("mode", "step", "value"), [("max", 4, 0.75), ("min", 6, 0.25)])
def test_the_best(tmp_path: Path, mode: str, step: int, value: float) -> None:
    scores = {2: 0.5, 4: 0.75, 6: 0.25, 8: float("nan"), 10: 0.5}
    plan = Plan(str(tmp_path), steps=11, every=3, validate=2)
    callback = scored(plan, scores, mode=mode)
    assert (callback.best, callback.best_step) == (value, step)
    assert files.load(tmp_path / "checkpoints" / "best.ckpt")["global_step"] == step


def test_the_best_is_known_after_a_resume(tmp_path: Path) -> None:
    plan = Plan(str(tmp_path), steps=5, every=1, validate=1)
    scored(plan, {1: 0.5, 2: 0.75, 3: 0.25, 4: 0.25, 5: 0.25})
    plan = Plan(**{**vars(plan), "steps": 8})
    callback = scored(plan, {6: 0.5, 7: 0.625, 8: 0.75})
    assert (callback.best, callback.best_step) == (0.75, 2)
    assert files.load(tmp_path / "checkpoints" / "best.ckpt")["global_step"] == 2
    callback = scored(Plan(**{**vars(plan), "steps": 9}), {9: 0.8125})
    assert (callback.best, callback.best_step) == (0.8125, 9)


def test_another_metric_starts_anew(caplog) -> None:
    old = Checkpoints(monitor="a")
    old.best, old.best_step = 0.9, 7
    new = Checkpoints(monitor="b")
    new.load_state_dict(old.state_dict())
    assert new.best is None
    same = Checkpoints(monitor="a")
    same.load_state_dict(old.state_dict())
    assert (same.best, same.best_step) == (0.9, 7)


def test_an_unknown_metric_is_named_with_those_there_are(tmp_path: Path, caplog) -> None:
    trainer, module = make(Plan(str(tmp_path), steps=4, every=2, validate=2), monitor="scroe")
    trainer.fit(module)
    assert caplog.text.count("no metric 'scroe' for best.ckpt; there are: score") == 1


class Probes(pl.Callback):
    """Logs as the online probes do, every three updates; the last one is measured too."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_) -> None:
        step = trainer.global_step
        if step % 3 == 0 or step == trainer.max_steps:
            values = {"val/knn1_top1": 0.5, "online/seconds": 1.0}
            pl_module.log_dict(values, logger=False, on_step=True, on_epoch=False, batch_size=1)


def warned(root: Path, monitor: str, caplog, *callbacks: pl.Callback, steps: int) -> list[str]:
    """What is said in a run without validation that saves every two updates."""
    caplog.clear()
    caplog.set_level("INFO", logger="contramask")
    train(Plan(str(root), steps=steps, every=2), *callbacks, monitor=monitor)
    return [r.message for r in caplog.records if "for best.ckpt" in r.message]


def test_a_metric_that_online_probes_do_not_log_is_named_once(tmp_path: Path, caplog) -> None:
    (message,) = warned(tmp_path, "val/knn20_top1", caplog, Probes(), steps=8)
    assert message == (
        "no metric 'val/knn20_top1' for best.ckpt; there are: online/seconds, val/knn1_top1"
    )
    assert "best.ckpt" not in names(tmp_path)
    said = [
        r.message.split()[:2] for r in caplog.records if r.name.endswith("callbacks.checkpoint")
    ]
    first = said.index(["no", "metric"])
    assert said[:first] == [["saved", "step-00000002.ckpt,"], ["saved", "step-00000004.ckpt,"]]


def test_a_metric_of_online_probes_is_not_missed_before_they_have_logged(
    tmp_path: Path, caplog
) -> None:
    assert warned(tmp_path, "val/knn1_top1", caplog, Probes(), steps=8) == []
    assert "best.ckpt" in names(tmp_path)


class Stops(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        trainer.should_stop = trainer.global_step == 5


def test_what_was_measured_before_a_stop_between_saves_is_not_missed(
    tmp_path: Path, caplog
) -> None:
    train(Plan(str(tmp_path), steps=9, every=50), Probes(), Stops(), monitor="val/knn1_top1")
    assert last(tmp_path)["global_step"] == 5
    assert "for best.ckpt" not in caplog.text


def test_without_any_evaluation_it_is_told_at_the_end(tmp_path: Path, caplog) -> None:
    (message,) = warned(tmp_path, "val/knn20_top1", caplog, steps=4)
    assert message == "no metric 'val/knn20_top1' for best.ckpt; there are: none"
    train(Plan(str(tmp_path / "b"), steps=2, every=2), Probes(), monitor="val/knn1_top1")
    assert warned(tmp_path / "b", "val/knn1_top1", caplog, steps=4) == []  # it is there, of before


def test_going_on_from_the_best_is_the_straight_run(tmp_path: Path) -> None:
    """It is written at the end of a validation, where Lightning's counters differ."""
    straight, again = tmp_path / "a", tmp_path / "b"
    plan = Plan(str(straight), steps=10, every=50, validate=4)
    scored(plan, {4: 0.5, 8: 0.25})
    best = straight / "checkpoints" / "best.ckpt"
    assert files.load(best)["global_step"] == 4
    trainer, module = make(Plan(**{**vars(plan), "root": str(again)}))
    again.mkdir()
    trainer.fit(module, ckpt_path=best)
    assert steps(again) == steps(straight)[4:]
    assert_same_end(straight, again)


def test_a_validation_inside_an_accumulation_window_cannot_choose(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"every 4 batches .* multiple of trainer.accumulate"):
        scored(Plan(str(tmp_path), accumulate=3, validate=4), {})
    callback = scored(Plan(str(tmp_path), accumulate=3, validate=6, steps=4), {2: 0.5, 4: 0.75})
    saved = files.load(tmp_path / "checkpoints" / "best.ckpt")
    progress = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    assert (callback.best, saved["global_step"], progress["processed"]) == (0.75, 4, 12)


class Learner(pl.Callback):
    """An observer that learns from each batch and keeps what it learned in the checkpoint."""

    def __init__(self):
        self.batches = 0

    def on_train_batch_end(self, *_: object) -> None:
        self.batches += 1

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.batches = state_dict["batches"]


def test_other_callbacks_have_seen_the_last_batch(tmp_path: Path) -> None:
    """Whether saved because due or because stopped, whatever the order of the callbacks."""
    plan = Plan(str(tmp_path), steps=8, every=3, stop_at=5)
    with pytest.raises(Preempted):
        train(plan, Learner())
    assert last(tmp_path)["callbacks"]["Learner"] == {"batches": 5}
    saved = files.load(tmp_path / "checkpoints" / "step-00000003.ckpt")
    assert saved["callbacks"]["Learner"] == {"batches": 3}
    learner = Learner()
    train(plan, learner)
    assert learner.batches == 8


def test_an_update_stays_as_large_as_it_was(tmp_path: Path) -> None:
    train(Plan(str(tmp_path), steps=3, accumulate=4))
    with pytest.raises(UserError, match=r"an update of this run is 4 micro-batches.*now 1 x 3"):
        train(Plan(str(tmp_path), steps=6, accumulate=3))
    # Spread over ranks it is the same update, of the same images.
    port = 28000 + os.getpid() % 900
    assert finish(start(Plan(str(tmp_path), steps=6, accumulate=2, ranks=2, port=port))) == [0, 0]
    both = [number for rank in (0, 1) for step, number, _ in steps(tmp_path, rank) if step >= 3]
    assert sorted(both) == list(range(12, 24))


@pytest.mark.parametrize("settings", [{"every": 0}, {"keep": -1}])
def test_impossible_settings(settings: dict[str, int]) -> None:
    with pytest.raises(UserError, match="every is at least 1 update"):
        Checkpoints(**settings)


def test_a_corrupt_last_falls_back_and_repeats_what_was_lost(tmp_path: Path, caplog) -> None:
    train(Plan(str(tmp_path / "a"), steps=9))
    plan = Plan(str(tmp_path / "b"), steps=9, stop_at=7)
    with pytest.raises(Preempted):
        train(plan)
    path = tmp_path / "b" / "checkpoints" / "last.ckpt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    train(Plan(**{**vars(plan), "stop_at": -1}))
    assert "last.ckpt is damaged" in caplog.text
    assert steps(tmp_path / "b") == steps(tmp_path / "a")[:7] + steps(tmp_path / "a")[4:]
    assert_same_end(tmp_path / "a", tmp_path / "b")


def test_killed_at_random_moments_also_inside_a_save(tmp_path: Path) -> None:
    plan = Plan(str(tmp_path / "a"), steps=12, every=2, ballast=24)
    assert finish(start(plan)) == [0]
    again = Plan(**{**vars(plan), "root": str(tmp_path / "b")})
    folder = tmp_path / "b" / "checkpoints"
    draw = random.Random(11)
    torn = 0
    for _ in range(4):
        (process,) = start(again)
        wait_for(folder / "last.ckpt")
        while not list(folder.glob("last.ckpt.tmp.*")) + list(folder.glob("step-*.tmp.*")):
            if process.exitcode is not None:
                break
            time.sleep(0.002)
        time.sleep(draw.random() * 0.05)  # a save takes about that long
        process.kill()
        process.join()
        torn += bool(list(folder.glob("*.tmp.*")))
    assert finish(start(again)) == [0]
    assert torn, "no kill hit a save: the ballast is too small for this machine"
    assert_same_end(tmp_path / "a", tmp_path / "b")
    straight = {step: (number, loss) for step, number, loss in steps(tmp_path / "a")}
    for step, number, loss in steps(tmp_path / "b"):
        assert straight[step] == (number, loss)
    assert not list(folder.glob("*.tmp.*"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_stops_all_ranks_with_one_message(tmp_path: Path, ranks: int) -> None:
    plan = Plan(str(tmp_path), steps=4, every=2, ranks=ranks, port=29000 + os.getpid() % 900)
    assert finish(start(plan)) == [0] * ranks
    plan = Plan(**{**vars(plan), "steps": 8, "room": 6000})
    assert finish(start(plan)) == [1] * ranks
    for rank in range(ranks):
        text = (tmp_path / f"log-{rank}.txt").read_text()
        assert "step-00000006.ckpt could not be written: File too large" in text
        assert "step-00000004.ckpt is good and untouched" in text
    assert names(tmp_path) == ["last.ckpt", "step-00000002.ckpt", "step-00000004.ckpt"]
    assert last(tmp_path)["global_step"] == 4


def test_the_sidecar_tells_the_step(tmp_path: Path) -> None:
    train(Plan(str(tmp_path), steps=3))
    (record,) = json.loads((tmp_path / "checkpoints" / "last.ckpt.json").read_text())
    assert record["step"] == 3


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_the_online_probes_themselves_are_heard(tmp_path: Path, caplog) -> None:
    saver = Checkpoints(tmp_path, every=2, monitor="val/knn20_top1")
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=2,
        callbacks=[OnlineProbes(every=2, bank=100, val=50, ks=(1,)), saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(probed_run.Training(), datamodule=probed_run.Data())
    assert REPORTED in trainer.callback_metrics
    assert "no metric 'val/knn20_top1' for best.ckpt; there are: " in caplog.text
    assert "val/knn1_top1, val/linear_top1" in caplog.text
