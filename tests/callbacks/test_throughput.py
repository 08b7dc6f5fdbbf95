"""Speeds, waits and counts, on a clock that the tests turn by hand."""

from collections import Counter
from unittest.mock import Mock

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.profilers import PassThroughProfiler, SimpleProfiler

from contramask.callbacks import throughput as module
from contramask.callbacks.clock import Clock
from contramask.callbacks.throughput import Throughput
from contramask.tracking.jsonl import JSONLLogger, read_metrics
from contramask.training.flops import StepFlops
from contramask.types import Batch
from tests.callbacks.watched_run import IMAGES, Made, network, train

pytestmark = pytest.mark.filterwarnings(
    "ignore:Found .* in eval mode",
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:.isinstance.treespec, LeafSpec.",
)

FETCH = "[_TrainingEpochLoop].train_dataloader_next"


class Hands:
    """A clock that moves when it is told."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def during(self, clock: Clock, action: str, seconds: float) -> None:
        clock.start(action)
        self.now += seconds
        clock.stop(action)


@pytest.fixture
def hands(monkeypatch) -> Hands:
    return Hands(monkeypatch)


def test_waiting_and_others_are_told_apart(hands):
    clock = Clock(PassThroughProfiler(), own="Throughput")
    hands.during(clock, FETCH, 2.0)
    hands.during(clock, "run_training_batch", 5.0)
    hands.during(clock, "[Callback]Throughput.on_train_batch_end", 7.0)
    hands.during(clock, "[Callback]Pictures{'every': 1}.on_train_batch_end", 11.0)
    assert (clock.waited, clock.aside) == (2.0, 11.0)
    clock.restart()
    assert (clock.waited, clock.aside) == (0.0, 0.0)


def test_callbacks_inside_a_validation_are_not_counted_twice(hands):
    clock = Clock(PassThroughProfiler(), own="Throughput")
    hands.during(clock, "[LightningModule]Pretraining.on_validation_model_zero_grad", 1.0)
    hands.now += 2.0  # the loader of validation starts
    clock.validation(True)
    hands.during(clock, "[Callback]Probes.on_validation_batch_end", 4.0)
    hands.now += 8.0
    clock.validation(False)
    hands.now += 16.0
    assert clock.aside == 15.0


def test_an_end_without_a_begin_is_nothing(hands):
    clock = Clock(PassThroughProfiler(), own="Throughput")
    hands.now += 3.0
    clock.stop("[Callback]Pictures.on_train_start")
    hands.during(clock, "[Callback]Pictures.on_train_start", 5.0)
    assert clock.aside == 5.0


def test_the_user_profiler_goes_on(tmp_path):
    profiler = SimpleProfiler(dirpath=tmp_path, filename="profile")
    trainer = train(tmp_path, Throughput(), steps=3, profiler=profiler)
    assert vars(trainer)["profiler"] is profiler
    assert "run_training_batch" in (tmp_path / "fit-profile.txt").read_text()


def test_the_keys_that_are_promised(tmp_path):
    trainer = train(tmp_path, Throughput(), steps=4, data=Made(wait=0.02))
    found = {k: float(v) for k, v in trainer.callback_metrics.items()}
    shown = {k for k in found if k.split("/")[0] in ("speed", "memory", "data")}
    assert shown == {
        "speed/images_per_s",
        "speed/step_s",
        "speed/data_wait",
        "speed/tflops",
        "memory/rss_gib",
        "data/images",
        "data/epoch",
        "data/skipped",
    }
    assert found["data/images"] == 4 * IMAGES
    assert found["data/epoch"] == 4 * IMAGES / 64
    assert found["data/skipped"] == 3
    assert found["speed/images_per_s"] * found["speed/step_s"] == pytest.approx(IMAGES)
    assert 0 < found["speed/data_wait"] < 1


def test_no_data_module_is_no_reason_to_fail(tmp_path):
    data = Made()
    del data.faults, data.num_train
    trainer = train(tmp_path, Throughput(), steps=2, data=data, log_every_n_steps=1)
    assert not {"data/epoch", "data/skipped"} & trainer.callback_metrics.keys()
    assert float(trainer.callback_metrics["data/images"]) == 2 * IMAGES


def test_accumulated_micro_batches_are_one_step(tmp_path):
    trainer = train(tmp_path, Throughput(), steps=4, accumulate_grad_batches=3)
    found = {k: float(v) for k, v in trainer.callback_metrics.items()}
    assert found["data/images"] == 4 * 3 * IMAGES
    assert found["speed/images_per_s"] * found["speed/step_s"] == pytest.approx(3 * IMAGES)


def test_skipped_samples_are_counted_on_after_a_resume(tmp_path):
    first = train(tmp_path, Throughput(), steps=2, log_every_n_steps=1)
    first.save_checkpoint(tmp_path / "a.ckpt")
    data = Made()
    data.faults = Counter({"truncated": 4})
    second = train(
        tmp_path, Throughput(), steps=4, data=data, resume=tmp_path / "a.ckpt", log_every_n_steps=1
    )
    assert float(second.callback_metrics["data/skipped"]) == 3 + 4


def report(monkeypatch, *, rank: int, world: int, precision: str, peak: float | None) -> dict:
    """What is logged of a window of 5 updates of 2 micro-batches in 10 s, 4 s of them others'."""
    monkeypatch.setattr(module, "peak_flops", lambda device, dtype: peak)
    logged: dict[str, float] = {}
    watcher = Throughput()
    watcher._clock = Clock(PassThroughProfiler(), own="Throughput")
    watcher._clock.waited, watcher._clock.aside = 3.0, 4.0
    watcher._window, watcher._step, watcher._images = 10, 15, 10 * 7
    watcher._operations = 6 * 10**12
    trainer = trainer_of(precision, world_size=world, global_rank=rank)
    net = Mock(spec=pl.LightningModule, device=torch.device("cpu"))
    net.log_dict = lambda values, **how: logged.update(values)
    batch = Batch(views={}, label=torch.zeros(7, dtype=torch.long), position=1400 + 7 * rank)
    watcher._report(trainer, net, batch, 10.0)
    return logged


def trainer_of(precision: str, **given: int) -> Mock:
    return Mock(spec=pl.Trainer, precision=precision, datamodule=None, loggers=[], **given)


def test_the_arithmetic_of_a_window(monkeypatch):
    found = report(monkeypatch, rank=1, world=2, precision="bf16-mixed", peak=40e12)
    assert found["speed/images_per_s"] == pytest.approx(2 * 70 / 6)
    assert found["speed/step_s"] == pytest.approx(6 / 5)
    assert found["speed/data_wait"] == pytest.approx(3 / 6)
    assert found["speed/tflops"] == pytest.approx(10 * 6 / 6)
    assert found["speed/mfu"] == pytest.approx(0.25)
    assert found["data/images"] == 1400 + 2 * 7


def test_utilisation_needs_a_known_peak_of_the_precision_used(monkeypatch):
    assert "speed/mfu" not in report(monkeypatch, rank=0, world=1, precision="32-true", peak=None)
    asked = []
    monkeypatch.setattr(module, "peak_flops", lambda device, dtype: asked.append(dtype))
    for precision in ("bf16-mixed", "bf16-true", "16-mixed", "32-true", "64-true"):
        watcher = Throughput()
        assert watcher._utilisation(trainer_of(precision), torch.device("cpu"), 1.0) == {}
        watcher._operations = 5
        watcher._utilisation(trainer_of(precision), torch.device("cpu"), 1.0)
    assert asked == [torch.bfloat16, torch.bfloat16, torch.float16, torch.float32]


def test_operations_are_those_of_a_micro_batch_and_hooks_are_gone(tmp_path):
    watcher, net = Throughput(), network()
    trainer = train(tmp_path, watcher, steps=1, module=net)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    data = Made()
    data.trainer = trainer
    batch = next(iter(data.train_dataloader()))
    step = net.place({**batch, "position": trainer.global_step * IMAGES})
    with StepFlops(net) as meter:
        feats = net.encode(batch, step)
        for term in net.terms.values():
            term(feats, batch, step)
    assert watcher._operations == meter.total(batch) > 0


def test_a_resume_drops_the_rows_of_the_lost_part(tmp_path):
    logger = JSONLLogger(tmp_path)
    train(tmp_path, Throughput(), steps=4, logger=logger).save_checkpoint(tmp_path / "a.ckpt")
    for step in (4, 5, 7):
        logger.log_metrics({"lost": 1.0}, step=step)
    given = {"resume": tmp_path / "a.ckpt", "logger": JSONLLogger(tmp_path)}
    train(tmp_path, Throughput(), steps=8, **given)
    rows = read_metrics(tmp_path)
    assert [r["step"] for r in rows if "lost" in r] == [4]
    assert [r["step"] for r in rows if "speed/step_s" in r] == [2, 4, 6, 8]
    assert [r["data/images"] for r in rows if "data/images" in r] == [8, 16, 24, 32]


class Failing(pl.Callback):
    def on_before_zero_grad(self, *args: object) -> None:
        raise ArithmeticError("on purpose")


def test_an_error_takes_clock_and_hooks_away(tmp_path):
    net, watcher = network(), Throughput()
    with pytest.raises(ArithmeticError):
        train(tmp_path, watcher, Failing(), module=net)
    assert watcher._flops is not None
    assert watcher._clock is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
