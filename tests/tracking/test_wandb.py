"""W&B offline, online, refused, lost and disabled; what it recorded is read back."""

import gc
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from PIL import Image

from contramask.tracking import wandb as tracking
from contramask.tracking.credentials import credentials
from contramask.tracking.wandb import STEP, Tracker, make_wandb
from contramask.types import UserError
from tests.tracking.readback import Recorded, read
from tests.tracking.server import Server

KEY = "k" * 40


@pytest.fixture(autouse=True)
def _nobody_at_home(monkeypatch, tmp_path):
    for name in [n for n in os.environ if n.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    monkeypatch.setenv("WANDB_X_DISABLE_STATS", "true")
    (tmp_path / "home").mkdir()
    yield
    if wandb := sys.modules.get("wandb"):
        wandb.teardown()


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "runs" / "hybrid"


def parts(run: Path, kind: str = "offline-run") -> list[Recorded]:
    sys.modules["wandb"].teardown()  # as at the end of a process; until then files may lag behind
    return [read(folder) for folder in sorted((run / "wandb").glob(f"{kind}-*"))]


def test_an_offline_run_holds_the_promised_keys_at_their_steps(run, caplog):
    caplog.set_level(logging.INFO, "contramask")
    logger = make_wandb(run, config={"model": {"lr": 0.5}}, tags=["a"], mode="auto")
    logger.log_metrics({"train/loss": 2.5, "epoch": 0}, step=4)
    logger.log_metrics({"train/loss": 2.0, "speed/mfu": float("nan")}, step=9)
    logger.finalize("success")
    (part,) = parts(run)
    assert [(r[STEP], r["train/loss"]) for r in part.rows] == [(4, 2.5), (9, 2.0)]
    assert "epoch" not in part.rows[0]
    assert part.config["model"] == {"lr": 0.5}
    assert (part.name, part.exit_code) == ("hybrid", 0)
    assert "*" in part.step_metrics
    (line,) = [m for m in caplog.messages if "wandb sync" in m]
    assert f"{run}/wandb/*run-*" in line


def test_a_restart_continues_the_same_run(run):
    for step, status in ((4, "failed"), (9, "success")):
        logger = make_wandb(run, mode="offline")
        logger.log_metrics({"train/loss": 1.0}, step=step)
        logger.finalize(status)
    first, second = parts(run)
    assert first.identity == second.identity == (run / "wandb-id.txt").read_text().strip()
    assert ([r[STEP] for r in first.rows], first.exit_code) == ([4], 1)
    assert ([r[STEP] for r in second.rows], second.exit_code) == ([9], 0)


def test_pictures_go_as_the_files_they_are(run, tmp_path):
    picture = tmp_path / "views.jpg"
    Image.new("RGB", (5, 4), "red").save(picture)
    logger = make_wandb(run, mode="offline")
    assert isinstance(logger, Tracker)
    logger.log_pictures({"pictures/views": picture}, step=7)
    logger.finalize("success")
    ((row,),) = [part.rows for part in parts(run)]
    (folder,) = (run / "wandb").glob("offline-run-*")
    assert row[STEP] == 7
    assert row["pictures/views/_type"] == "image-file"
    sent = folder / "files" / row["pictures/views/path"]
    assert sent.suffix == ".jpg"
    assert sent.read_bytes() == picture.read_bytes()


def test_alerts_are_recorded_offline_in_full(run):
    logger = make_wandb(run, mode="offline")
    assert isinstance(logger, Tracker)
    logger.alert("uniform collapse", "all images get the same feature")
    logger.alert("t" * 80, "a title the server would refuse")
    logger.finalize("success")
    (part,) = parts(run)
    assert part.alerts == [
        ("uniform collapse", "all images get the same feature", "WARN"),
        ("t" * 63, "a title the server would refuse", "WARN"),
    ]


def test_a_preempted_run_says_so(run):
    logger = make_wandb(run, mode="offline")
    assert isinstance(logger, Tracker)
    logger.mark_preempting()  # before the first number: there is no run to mark
    logger.log_metrics({"train/loss": 1.0}, step=1)
    logger.mark_preempting()
    logger.finalize("failed")
    (part,) = parts(run)
    assert part.kinds.count("preempting") == 1


def test_online_numbers_arrive_and_a_lost_server_blocks_nothing(run, monkeypatch, caplog):
    server = Server()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(tracking, "FINISH_TIMEOUT", 1.0)
    logger = make_wandb(run, mode="auto", group="night", tags=["x"])
    logger.log_metrics({"train/loss": 2.5}, step=4)
    logger.finalize("success")
    assert [(r[STEP], r["train/loss"]) for r in server.rows] == [(4, 2.5)]
    assert server.upserts[0]["groupName"] == "night"
    assert server.upserts[0]["displayName"] == "hybrid"

    logger.log_metrics({"train/loss": 1.5}, step=9)
    server.stop()
    logger.log_metrics({"train/loss": 1.0}, step=14)
    caplog.clear()
    logger.finalize("success")
    assert "did not take the rest in 1 s" in caplog.text
    assert "wandb sync --include-online" in caplog.text
    assert [r[STEP] for r in parts(run, "run")[-1].rows] == [9, 14]


def test_a_server_that_refuses_at_the_start_is_replaced_by_files(run, monkeypatch, caplog):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("WANDB_BASE_URL", address)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(tracking, "INIT_TIMEOUT", 1.0)
    logger = make_wandb(run, mode="online")
    logger.log_metrics({"train/loss": 2.5}, step=4)
    logger.finalize("success")
    (part,) = parts(run)
    assert [r[STEP] for r in part.rows] == [4]
    (line,) = [m for m in caplog.messages if address in m]
    assert "wandb sync" in line


def test_a_dead_service_is_told_once_and_training_goes_on(run, caplog):
    logger = make_wandb(run, mode="offline")
    logger.log_metrics({"train/loss": 2.5}, step=4)
    for child in psutil.Process().children(recursive=True):
        if child.name().startswith("wandb"):
            child.kill()
            child.wait()
    for step in range(5, 15):
        logger.log_metrics({"train/loss": 2.5}, step=step)
    logger.finalize("success")
    assert len([m for m in caplog.messages if "given up" in m]) == 1
    for process in gc.get_objects():  # wandb drops its handle of a dead process without waiting
        if type(process) is subprocess.Popen:  # isinstance would ask proxies for their class
            process.poll()


def test_other_ranks_write_nothing(run, monkeypatch):
    monkeypatch.setattr("lightning_utilities.core.rank_zero.rank_zero_only.rank", 1)
    logger = make_wandb(run, mode="offline")
    logger.log_metrics({"train/loss": 1.0}, step=1)
    assert isinstance(logger, Tracker)
    logger.alert("collapse", "of another rank")
    logger.finalize("success")
    assert not run.exists()


def test_disabled_imports_nothing(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it would raise
    logger = make_wandb(run, mode="disabled")
    logger.log_metrics({"train/loss": 1.0}, step=1)
    logger.finalize("success")
    assert not run.exists()
    with pytest.raises(ImportError):
        make_wandb(run, mode="offline").log_metrics({"train/loss": 1.0}, step=1)


@pytest.mark.parametrize(
    ("set_up", "online"),
    [
        ({}, False),
        ({"WANDB_API_KEY": KEY}, True),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, False),
        ({"WANDB_MODE": "online"}, True),
    ],
)
def test_auto_is_online_with_a_key_alone(run, monkeypatch, set_up, online):
    for name, value in set_up.items():
        monkeypatch.setenv(name, value)
    logger = make_wandb(run, mode="auto")
    assert isinstance(logger, Tracker)
    assert logger.online is online


def test_a_key_in_netrc_counts_for_its_server_alone(tmp_path, monkeypatch):
    (tmp_path / "home" / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert credentials() == str(tmp_path / "home" / ".netrc")
    folder = tmp_path / "home" / ".config" / "wandb"
    folder.mkdir(parents=True)
    (folder / "settings").write_text("[default]\nbase_url = https://wandb.example.org\n")
    assert credentials() is None
    monkeypatch.setenv("WANDB_BASE_URL", "https://api.wandb.ai")
    assert credentials() is not None
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert credentials() is None


def test_a_broken_netrc_is_named(tmp_path, caplog):
    (tmp_path / "home" / ".netrc").write_text("machine\nwhat is this")
    assert credentials() is None
    assert ".netrc" in caplog.text


def test_an_unknown_mode_is_refused(run, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "onlne")
    with pytest.raises(UserError, match="'onlne'; allowed are auto, online, offline, disabled"):
        make_wandb(run, mode="auto")
