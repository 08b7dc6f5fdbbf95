import logging
import os
from pathlib import Path

import pytest
import yaml

from contramask.checkpoints import files
from contramask.checkpoints.differences import differences
from contramask.checkpoints.runs import Run, is_first, latest, open_run, run_name
from contramask.types import UserError

CONFIG = {
    "seed": 3,
    "model": {"optim": {"lr": 1e-3, "betas": [0.9, 0.95]}, "objectives": {"a": {"mask": None}}},
    "data": {"train": "/net/shards/train-{0..7}.tar", "workers": 2},
    "trainer": {"max_steps": 100, "devices": 1, "callbacks": [{"class_path": "x.Y", "every": 5}]},
}


@pytest.fixture(autouse=True)
def _alone(monkeypatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "CONTRAMASK_RUN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("PROCID", "JOB_ID", "JOB_NAME", "ARRAY_JOB_ID", "ARRAY_TASK_ID"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)


def changed(**keys: object) -> dict:
    """The configuration with dotted keys replaced (`__` for the dot)."""
    config = yaml.safe_load(yaml.safe_dump(CONFIG))
    for key, value in keys.items():
        *path, leaf = key.split("__")
        node = config
        for part in path:
            node = node[part]
        node[leaf] = value
    return config


def checkpoint(run: Run, step: int) -> Path:
    path = run.checkpoints / f"step-{step:08d}.ckpt"
    files.write({"global_step": step}, path)
    return path


def test_a_new_run(tmp_path: Path) -> None:
    run = open_run(tmp_path, "a", CONFIG)
    assert run == Run(tmp_path / "a")
    assert (run.name, run.checkpoints) == ("a", tmp_path / "a" / "checkpoints")
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == CONFIG


def test_continue_what_is_there(tmp_path: Path) -> None:
    first = open_run(tmp_path, "a", CONFIG)
    assert open_run(tmp_path, "a", CONFIG).checkpoint is None  # it ended before its first save
    last = checkpoint(first, 40)
    assert open_run(tmp_path, "a", CONFIG, resume="auto").checkpoint == last
    assert open_run(tmp_path, "a", CONFIG, resume=True).checkpoint == last


def test_a_used_directory_is_not_started_afresh(tmp_path: Path) -> None:
    run = open_run(tmp_path, "a", CONFIG, resume=False)
    with pytest.raises(
        UserError, match=r"a is in use \(it has no checkpoint yet\): continue it wi"
    ):
        open_run(tmp_path, "a", CONFIG, resume=False)
    checkpoint(run, 40)
    with pytest.raises(UserError, match=r"\(its last checkpoint is of step 40\).*--resume auto"):
        open_run(tmp_path, "a", CONFIG, resume=False)


def test_resume_true_insists(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no checkpoint in .*--resume auto"):
        open_run(tmp_path, "a", CONFIG, resume=True)


def test_every_rank_insists_and_nothing_is_made(tmp_path: Path, monkeypatch) -> None:
    for rank in ("0", "3"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(UserError, match=r"there is no checkpoint in"):
            open_run(tmp_path, "a", CONFIG, resume=True)
    assert not (tmp_path / "a").exists()


def test_only_damaged_checkpoints_are_no_reason_to_start_again(tmp_path: Path, caplog) -> None:
    path = checkpoint(open_run(tmp_path, "a", CONFIG), 40)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"none of the checkpoints in .* is whole"):
        open_run(tmp_path, "a", CONFIG)
    assert "step-00000040.ckpt is damaged" in caplog.text


def test_a_damaged_last_falls_back(tmp_path: Path, caplog) -> None:
    run = open_run(tmp_path, "a", CONFIG)
    good, bad = checkpoint(run, 40), checkpoint(run, 80)
    bad.write_bytes(b"x" + bad.read_bytes()[1:])
    with caplog.at_level(logging.WARNING):
        assert open_run(tmp_path, "a", CONFIG).checkpoint == good
    assert "step-00000080.ckpt is damaged" in caplog.text


def test_another_configuration_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    checkpoint(open_run(tmp_path, "a", CONFIG), 40)
    other = changed(model__optim__lr=3e-3, model__extra=4, trainer__max_steps=200)
    with pytest.raises(UserError) as info:
        open_run(tmp_path, "a", other)
    assert str(info.value) == (
        f"run directory {tmp_path / 'a'} belongs to another configuration: model.extra: not set -> "
        "4; model.optim.lr: 0.001 -> 0.003; trainer.max_steps: 100 -> 200 (schedules are functions "
        "of step / max_steps: another length is another run from its first step on); put these "
        "back to continue the run, or start another with another --name"
    )
    assert yaml.safe_load((tmp_path / "a" / "config.yaml").read_text()) == CONFIG


@pytest.mark.parametrize(
    "keys",
    [
        {"trainer__devices": 8},
        {"trainer__callbacks": [{"class_path": "x.Z"}, {"class_path": "x.Y"}]},
        {"trainer__callbacks": []},
        {"trainer__strategy": {"class_path": "x.DDP"}},
        {"data__workers": 12},
        {"data__train": "/local/4711/train-{0..7}.tar"},
        {"trainer__accumulate_grad_batches": 4},
        {"name": "a"},
    ],
)
def test_what_may_change(tmp_path: Path, keys: dict) -> None:
    checkpoint(open_run(tmp_path, "a", CONFIG), 40)
    open_run(tmp_path, "a", changed(**keys))


@pytest.mark.parametrize(
    "keys",
    [
        {"seed": 4},
        {"data__train": "/net/shards/train-{0..8}.tar"},
        {"data__train": "/net/shards/train-{0..7}.tar::/net/more/x.tar"},
        {"model__optim__betas": [0.9, 0.99]},
        {"model__objectives": {"a": {"mask": "random"}}},
        {"model__objectives": {"b": {"mask": None}}},
    ],
)
def test_what_may_not(tmp_path: Path, keys: dict) -> None:
    checkpoint(open_run(tmp_path, "a", CONFIG), 40)
    with pytest.raises(UserError, match="another configuration"):
        open_run(tmp_path, "a", changed(**keys))


def test_a_start_that_failed_does_not_keep_the_name(tmp_path: Path) -> None:
    open_run(tmp_path, "a", CONFIG)
    other = changed(model__optim__lr=3e-3)
    run = open_run(tmp_path, "a", other)
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == other
    checkpoint(run, 40)
    with pytest.raises(UserError, match="another configuration"):
        open_run(tmp_path, "a", CONFIG)


def test_the_newest_run_of_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run of mae in .* \(0 looked at\)"):
        latest(tmp_path, "mae", CONFIG)
    times = ("20260101-101010", "20260102-101010", "20260103-101010", "20260104-101010")
    configs = (CONFIG, CONFIG, changed(seed=4), CONFIG)
    runs = [open_run(tmp_path, f"mae-{t}", c) for t, c in zip(times, configs, strict=True)]
    for i, run in enumerate(runs[:3]):  # the last one has no checkpoint yet
        os.utime(checkpoint(run, 40).parent, (i, i))
    checkpoint(open_run(tmp_path, "mae-new-20260105-101010", CONFIG), 40)
    assert latest(tmp_path, "mae", CONFIG) == runs[1].name
    assert latest(tmp_path, "mae", changed(seed=4)) == runs[2].name
    with pytest.raises(UserError, match=r"\(4 looked at\); give --name"):
        latest(tmp_path, "mae", changed(seed=5))


def test_differences_of_lists() -> None:
    a = {"files": ["/x/1.tar", "/x/2.tar"], "parts": [{"n": 1}, {"n": 2}]}
    b = {"files": ["/y/1.tar", "/y/2.tar"], "parts": [{"n": 1}]}
    assert differences(a, a) == []
    assert differences(a, b, movable=["files"]) == ["parts.1.n: 2 -> not set"]
    assert len(differences(a, b)) == 2


def test_differences_of_weighted_sources() -> None:
    a = {"data": {"train": {"/x/1.tar": 2.0, "/x/2.tar::/x/3.tar": 1.0}}}
    b = {"data": {"train": {"/y/1.tar": 2.0, "/y/2.tar::/z/3.tar": 1.0}}}
    c = {"data": {"train": {"/x/1.tar": 2.0, "/x/2.tar::/x/3.tar": 3.0}}}
    assert differences(a, b, movable=["data.train"]) == []
    assert differences(a, c, movable=["data.train"]) != []


def test_only_the_first_rank_writes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "3")
    run = open_run(tmp_path, "a", CONFIG)
    assert not run.path.exists()
    monkeypatch.setenv("SLURM_PROCID", "0")
    last = checkpoint(open_run(tmp_path, "a", CONFIG), 40)
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert open_run(tmp_path, "a", changed(seed=4)).checkpoint == last  # the first rank refuses


@pytest.mark.parametrize(
    ("places", "first"),
    [
        ({}, True),
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "5"}, False),
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),  # a shell in a job, local processes
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),
    ],
)
def test_the_first_process(places: dict, first: bool, monkeypatch) -> None:
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    assert is_first() == first


def test_the_users_name_wins(monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert run_name("mine_1.2", Path("mae.yaml")) == "mine_1.2"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".hidden", "a b", "-x", "a\n"])
def test_names_that_are_no_directory_names(name: str) -> None:
    with pytest.raises(UserError, match="set --name"):
        run_name(name)


def test_a_job_finds_its_run_after_a_requeue(monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_JOB_NAME", "contramask")
    assert run_name(None, Path("configs/mae.yaml")) == "mae-4711"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4700")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert run_name(None, Path("configs/mae.yaml")) == "mae-4700_2"


def test_runs_in_a_shell_of_a_job_are_told_apart_by_time(monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    assert run_name(None).startswith("run-2")


def test_processes_of_one_run_agree_on_the_time(monkeypatch) -> None:
    monkeypatch.setattr("time.strftime", lambda _: "20260102-030405")
    assert run_name(None, Path("mae.yaml")) == "mae-20260102-030405"
    monkeypatch.setattr("time.strftime", lambda _: "20260102-030406")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_name(None, Path("mae.yaml")) == "mae-20260102-030405"
    monkeypatch.delenv("LOCAL_RANK")
    assert run_name(None, Path("mae.yaml")) == "mae-20260102-030406"  # the next run of a session
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("CONTRAMASK_RUN")
    with pytest.raises(UserError, match="needs --name"):
        run_name(None)
