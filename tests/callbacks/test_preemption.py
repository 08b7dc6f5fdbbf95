import os
import signal
import stat
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector

from contramask.callbacks import preemption
from contramask.callbacks.agreement import Agreement
from contramask.callbacks.checkpoint import Checkpoints
from contramask.callbacks.preemption import Preempted, Preemption, environment_plugins, requeue
from contramask.callbacks.signals import Inbox, inbox
from contramask.checkpoints import files
from contramask.types import UserError
from tests.callbacks.small_run import (
    Plan,
    Small,
    finish,
    launch,
    make,
    start,
    steps,
    train,
    wait_for,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


@pytest.fixture(autouse=True)
def _signals(monkeypatch):
    for name in ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "NTASKS", "JOB_NAME"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    before = {n: signal.getsignal(n) for n in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)}
    yield
    inbox.restore()
    assert {n: signal.getsignal(n) for n in before} == before


def port() -> int:
    return 30000 + os.getpid() % 900


def saved(root: Path) -> int:
    return files.load(root / "checkpoints" / "last.ckpt")["global_step"]


# One process


def test_sigterm_stops_after_the_update_and_says_how_to_go_on(tmp_path: Path, caplog) -> None:
    root = tmp_path / "tiny-run"
    with pytest.raises(Preempted) as stop:
        train(Plan(str(root), stop_at=5))
    assert stop.value.code == 128 + signal.SIGTERM
    assert saved(root) == len(steps(root)) == 5
    assert "SIGTERM after update 5; saved " in caplog.text
    assert "--name tiny-run --resume auto" in caplog.text


def test_a_signal_inside_an_accumulation_window_waits_for_its_end(tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        train(Plan(str(tmp_path), stop_at=3, accumulate=4))
    assert (saved(tmp_path), len(steps(tmp_path))) == (3, 12)


class InterruptTwice(pl.Callback):
    def __init__(self, times: int):
        self.times = times

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == 2:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)  # two of a kind that are pending together arrive as one


def test_one_interrupt_saves(tmp_path: Path) -> None:
    with pytest.raises(Preempted) as stop:
        train(Plan(str(tmp_path)), InterruptTwice(1))
    assert stop.value.code == 128 + signal.SIGINT
    assert saved(tmp_path) == 3


def test_a_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        train(Plan(str(tmp_path)), InterruptTwice(2))
    assert not isinstance(stop.value, Preempted)
    assert files.newest(tmp_path / "checkpoints") is None


def test_a_signal_during_set_up(tmp_path: Path, caplog) -> None:
    train(Plan(str(tmp_path), steps=4))
    with pytest.raises(Preempted) as stop:
        train(Plan(str(tmp_path), steps=8, stop_in_setup=True))
    assert stop.value.code == 128 + signal.SIGTERM
    assert "nothing new to save" in caplog.text
    assert (saved(tmp_path), len(steps(tmp_path))) == (4, 4)
    train(Plan(str(tmp_path), steps=8))
    assert len(steps(tmp_path)) == 8


def test_a_signal_before_there_is_a_trainer(tmp_path: Path) -> None:
    """The command line watches from its first line."""
    inbox.watch()
    os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(Preempted) as stop:
        train(Plan(str(tmp_path)))
    assert stop.value.code == 128 + signal.SIGUSR1
    assert not (tmp_path / "trace-0.jsonl").exists()


def test_the_process_can_train_again_after_it_was_stopped(tmp_path: Path) -> None:
    plan = Plan(str(tmp_path), stop_at=5)
    with pytest.raises(Preempted):
        train(plan)
    train(plan)
    assert saved(tmp_path) == 12


def test_a_finished_run_gives_the_signals_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    train(Plan(str(tmp_path), steps=2))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_an_error_gives_the_signals_back(tmp_path: Path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Small, "training_step", fail)
    with pytest.raises(ZeroDivisionError):
        train(Plan(str(tmp_path), steps=2))
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_is_called_before_the_exit(tmp_path: Path) -> None:
    trainer, module = make(Plan(str(tmp_path), stop_at=3))
    calls: list[int] = []
    (callback,) = [c for c in trainer.checkpoint_callbacks if isinstance(c, Preemption)]
    callback.before_exit.append(lambda: calls.append(saved(tmp_path)))
    with pytest.raises(Preempted):
        trainer.fit(module)
    assert calls == [3]  # once, after the checkpoint


def test_it_needs_the_checkpoint_callback(tmp_path: Path) -> None:
    trainer = pl.Trainer(accelerator="cpu", callbacks=[Preemption()], logger=False, max_steps=1)
    with pytest.raises(UserError, match="the callback Checkpoints, which is missing"):
        trainer.fit(Small(Plan(str(tmp_path))))


def test_the_greatest_signal_counts() -> None:
    box = Inbox()
    box.watch(signal.SIGUSR1, signal.SIGTERM)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    assert box.received == signal.SIGTERM
    box.deafen()
    os.kill(os.getpid(), signal.SIGTERM)
    box.restore()
    assert box.received == 0


def test_watching_is_for_the_main_thread(caplog) -> None:
    from threading import Thread

    box = Inbox()
    thread = Thread(target=box.watch)
    thread.start()
    thread.join()
    assert "signals to stop are not heeded" in caplog.text


# Lightning


def test_lightning_keeps_off_signals_throughout(tmp_path: Path, monkeypatch) -> None:
    seen = []
    plain = Small.train_dataloader

    def loader(self: Small):
        seen.append(signal.getsignal(signal.SIGTERM))
        return plain(self)

    monkeypatch.setattr(Small, "train_dataloader", loader)
    train(Plan(str(tmp_path), steps=1))
    assert seen == [inbox._note]


def test_lightning_does_not_ask_before_each_batch(tmp_path: Path) -> None:
    trainer, module = make(Plan(str(tmp_path), steps=2))
    trainer.fit(module)
    assert trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor() is None  # no group, no error
    assert trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor is preemption._nothing


def test_the_installed_lightning_has_what_is_replaced() -> None:
    """If this fails, read how the new version treats signals, and `keep_lightning_off_signals`."""
    assert "register_signal_handlers" in vars(_SignalConnector)
    assert "_broadcast_sigterm_tensor" in vars(_TrainingEpochLoop)


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, 0),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train"}, 1),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "bash"}, 0),
    ],
)
def test_the_environment_has_no_auto_requeue(environment: dict, count: int, monkeypatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    plugins = environment_plugins()
    assert [plugin.auto_requeue for plugin in plugins] == [False] * count


# SLURM, played by a script


def play_scontrol(folder: Path, state: str, monkeypatch, *, fail: int = 0, code: int = 0) -> Path:
    """Put a `scontrol` on PATH that logs its calls, and fails the first few times."""
    calls = folder / "calls.txt"
    program = folder / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(
        f"""#!/bin/sh
        echo "$@" >> {calls}
        [ "$(wc -l < {calls})" -gt {fail} ] || {{ echo 'Socket timed out' >&2; exit 1; }}
        [ "$1" = show ] && echo "JobId=7 JobName=x JobState={state} Reason=None"
        [ "$1" = show ] || exit {code}
        """
    )
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(preemption, "PAUSE", 0.0)
    return calls


def test_a_running_job_is_requeued_once(tmp_path: Path, monkeypatch) -> None:
    calls = play_scontrol(tmp_path, "RUNNING", monkeypatch)
    with pytest.raises(Preempted) as stop:
        train(Plan(str(tmp_path / "run"), stop_at=3))
    assert stop.value.code == 75
    assert calls.read_text().splitlines() == ["show job 7 -o", "requeue 7"]
    assert saved(tmp_path / "run") == 3


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "TIMEOUT"])
def test_a_job_that_is_ending_is_not(tmp_path: Path, state: str, monkeypatch, caplog) -> None:
    calls = play_scontrol(tmp_path, state, monkeypatch)
    with pytest.raises(Preempted) as stop:
        train(Plan(str(tmp_path / "run"), stop_at=3))
    assert stop.value.code == 143
    assert calls.read_text().splitlines() == ["show job 7 -o"]
    assert f"JobState={state}" in caplog.text
    assert saved(tmp_path / "run") == 3


def test_ctrl_c_in_a_job_is_no_reason_to_run_again(tmp_path: Path, monkeypatch) -> None:
    calls = play_scontrol(tmp_path, "RUNNING", monkeypatch)
    with pytest.raises(Preempted) as stop:
        train(Plan(str(tmp_path / "run")), InterruptTwice(1))
    assert stop.value.code == 130
    assert not calls.exists()


def test_an_array_task_is_requeued_by_its_own_number(tmp_path: Path, monkeypatch) -> None:
    calls = play_scontrol(tmp_path, "RUNNING", monkeypatch)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert requeue()
    assert calls.read_text().splitlines() == ["show job 7 -o", "requeue 5_2"]


def test_a_busy_controller_is_asked_again(tmp_path: Path, monkeypatch) -> None:
    calls = play_scontrol(tmp_path, "RUNNING", monkeypatch, fail=2)
    assert requeue()
    assert calls.read_text().splitlines() == ["show job 7 -o"] * 3 + ["requeue 7"]


def test_a_dead_controller_is_not_asked_for_ever(tmp_path: Path, monkeypatch, caplog) -> None:
    calls = play_scontrol(tmp_path, "RUNNING", monkeypatch, fail=99)
    assert not requeue()
    assert len(calls.read_text().splitlines()) == 3
    assert "its state is unknown" in caplog.text


def test_a_job_that_slurm_will_not_requeue(tmp_path: Path, monkeypatch, caplog) -> None:
    play_scontrol(tmp_path, "RUNNING", monkeypatch, code=1)
    assert not requeue()
    assert "job 7 stays as it is" in caplog.text


def test_no_scontrol_on_the_node(monkeypatch, caplog) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(preemption, "PAUSE", 0.0)
    assert not requeue()
    assert "No such file or directory: 'scontrol'" in caplog.text


def test_outside_slurm_nothing_is_asked(tmp_path: Path, monkeypatch) -> None:
    calls = play_scontrol(tmp_path, "RUNNING", monkeypatch)
    monkeypatch.delenv("SLURM_JOB_ID")
    assert not requeue()
    assert not calls.exists()


# Several processes


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_one_rank_stops_both_after_the_same_update(
    tmp_path: Path, number: signal.Signals
) -> None:
    plan = Plan(str(tmp_path / "b"), steps=400, every=1000, ranks=2, port=port(), pause=0.002)
    ranks = start(plan)
    wait_for(tmp_path / "b" / "trace-1.jsonl")
    time.sleep(0.05)
    os.kill(ranks[1].pid, number)
    assert finish(ranks) == [128 + number, 0]
    traces = [steps(tmp_path / "b", rank) for rank in (0, 1)]
    assert 0 < len(traces[0]) == len(traces[1]) < 400
    assert saved(tmp_path / "b") == len(traces[0])


def test_two_ranks_interrupted_again_and_again_are_the_straight_run(tmp_path: Path) -> None:
    straight = Plan(str(tmp_path / "a"), steps=30, ranks=2, port=port(), workers=1)
    assert finish(start(straight)) == [0, 0]
    plan = Plan(**{**vars(straight), "root": str(tmp_path / "b"), "pause": 0.01})
    for victim in (0, 1):
        ranks = start(plan)
        done = len(steps(tmp_path / "b")) if victim else 0
        while not (tmp_path / "b" / "trace-0.jsonl").exists() or (
            len(steps(tmp_path / "b")) < done + 4 and ranks[0].is_alive()
        ):
            time.sleep(0.01)
        os.kill(ranks[victim].pid, signal.SIGTERM)
        assert finish(ranks) == [143, 0]
    assert finish(start(plan)) == [0, 0]
    for rank in (0, 1):
        assert steps(tmp_path / "a", rank) == steps(tmp_path / "b", rank)
    one, two = (files.load(tmp_path / x / "checkpoints" / "last.ckpt") for x in "ab")
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name


def test_a_signal_to_the_whole_group_leaves_the_workers_alive(tmp_path: Path) -> None:
    """As SLURM sends it: to the trainer and to its data workers alike."""
    plan = Plan(str(tmp_path), steps=4000, every=5000, workers=2, pause=0.001)
    (process,) = start(plan)
    wait_for(tmp_path / "trace-0.jsonl")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    for pid in [*map(int, children), process.pid]:
        os.kill(pid, signal.SIGTERM)
    assert finish([process]) == [143]
    assert saved(tmp_path) == len(steps(tmp_path))


def test_ranks_that_would_go_on_from_different_updates_are_refused(tmp_path: Path) -> None:
    """Two nodes that do not see the same directory."""
    train(Plan(str(tmp_path / "one"), steps=3))
    roots = [str(tmp_path / folder) for folder in ("one", "two")]
    ranks = launch([Plan(root, steps=9, ranks=2, port=port()) for root in roots])
    assert finish(ranks) == [1, 1]
    for rank, root in enumerate(roots):
        assert (
            "different checkpoints, of steps [3, 0]" in (Path(root) / f"log-{rank}.txt").read_text()
        )


def test_agreement_alone() -> None:
    now, late = Agreement(delayed=False), Agreement(delayed=True)
    rows = [torch.tensor([n, 0]) for n in range(3)]
    tables = [now.put(row, step=n, names=("a", "b")) for n, row in enumerate(rows)]
    assert [(t.step, t.rows.tolist()) for t in tables if t] == [(n, [[n, 0]]) for n in range(3)]
    assert now.flush() is None
    tables = [late.put(row, step=n, names=("a", "b")) for n, row in enumerate(rows)]
    assert tables[0] is None
    assert [t.step for t in tables[1:] if t] == [0, 1]
    last = late.flush()
    assert last is not None
    assert (last.step, last.names, last.rows.tolist()) == (2, ("a", "b"), [[2, 0]])
    assert late.flush() is None


def test_the_checkpoint_callback_is_found_whatever_the_order(tmp_path: Path) -> None:
    plan = Plan(str(tmp_path), stop_at=3)
    trainer, module = make(plan)
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, Checkpoints)]
    trainer.callbacks.insert(0, Checkpoints(every=2))
    with pytest.raises(Preempted):
        trainer.fit(module)
    assert saved(tmp_path) == 3
