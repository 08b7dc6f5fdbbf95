"""Numbers in the run directory: whole lines, one row a step, whatever ended the run before."""

import csv
import json
import logging
import math
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contramask.tracking.jsonl import JSONLLogger, read_metrics, write_csv


def test_rows_are_joined_by_step_and_the_last_value_wins(tmp_path):
    logger = JSONLLogger(tmp_path)
    logger.log_metrics({"train/loss": torch.tensor(2.5), "epoch": 0}, step=4)
    logger.log_metrics({"probe/knn": 0.25, "train/loss": 2.0}, step=4)
    logger.log_metrics({"data/images": 12}, step=9)
    first, second = read_metrics(tmp_path)
    assert first.pop("time") <= second.pop("time") <= time.time() + 0.001
    assert first == {"step": 4, "train/loss": 2.0, "probe/knn": 0.25}
    assert second == {"step": 9, "data/images": 12}


def test_each_call_is_on_disk_at_once_and_is_valid_json(tmp_path):
    logger = JSONLLogger(tmp_path)
    logger.log_metrics({"a": math.nan, "b": math.inf, "c": -math.inf}, step=1)
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    assert json.loads(text, parse_constant=refuse)["a"] == "NaN"
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["a"])
    assert (row["b"], row["c"]) == (math.inf, -math.inf)


def test_single_precision_numbers_are_written_short_and_read_back_exactly(tmp_path):
    logger = JSONLLogger(tmp_path)
    values = {
        "lr": torch.tensor(9.375e-06),
        "big": torch.tensor(1e30),
        "double": 0.1234567890123,
        "huge": 1e300,
    }
    logger.log_metrics(values, step=0)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert '"lr": 9.375e-06' in text
    assert '"double": 0.1234567890123' in text
    (row,) = read_metrics(tmp_path)
    assert torch.tensor(row["lr"]) == values["lr"]
    assert torch.tensor(row["big"]) == values["big"]


def test_resume_drops_what_was_written_after_its_step(tmp_path):
    lost = JSONLLogger(tmp_path)
    for step in (2, 4, 6, 8):
        lost.log_metrics({"train/loss": float(step), "only/before": 1.0}, step=step)
    resumed = JSONLLogger(tmp_path)
    resumed.rewind(4)
    assert [r["step"] for r in read_metrics(tmp_path)] == [2, 4]
    resumed.log_metrics({"train/loss": 60.0}, step=6)
    rows = read_metrics(tmp_path)
    assert [(r["step"], r["train/loss"]) for r in rows] == [(2, 2.0), (4, 4.0), (6, 60.0)]
    assert "only/before" not in rows[-1]


def test_resume_without_rewind_supersedes_equal_steps(tmp_path):
    JSONLLogger(tmp_path).log_metrics({"x": 1.0}, step=3)
    JSONLLogger(tmp_path).log_metrics({"x": 2.0}, step=3)
    assert [r["x"] for r in read_metrics(tmp_path)] == [2.0]


def test_rewind_of_a_new_run_writes_nothing(tmp_path):
    JSONLLogger(tmp_path / "new").rewind(0)
    assert not (tmp_path / "new").exists()


@given(cut=st.integers(0, 200))
def test_a_file_cut_anywhere_gives_its_whole_lines_and_goes_on(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("cut")
    logger = JSONLLogger(folder)
    for step in range(3):
        logger.log_metrics({"train/loss": 0.5, "é": 2.0}, step=step)
    path = folder / "metrics.jsonl"
    os.truncate(path, max(0, path.stat().st_size - cut))
    whole = path.read_bytes().count(b"\n")
    kept = len(read_metrics(path))
    # A line that lacks its line feed alone is whole too: readers may take it.
    assert kept in (whole, whole + 1)
    JSONLLogger(folder).log_metrics({"train/loss": 7.0}, step=9)
    rows = read_metrics(path)
    assert len(rows) == whole + 1
    assert (rows[-1]["step"], rows[-1]["train/loss"]) == (9, 7.0)


def test_a_spoilt_line_is_named_and_costs_itself_alone(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "x": 1}\n{"step": 2, "x\n[3]\n{"y": 0}\n{"step": 4, "x": 4}\n')
    assert [r["step"] for r in read_metrics(path)] == [1, 4]
    assert ["line 2" in caplog.messages[0], "line 3" in caplog.messages[1]] == [True, True]
    assert len(caplog.messages) == 3


def test_kill_9_loses_no_finished_line(tmp_path):
    code = (
        "import sys, os, signal\n"
        "from contramask.tracking.jsonl import JSONLLogger\n"
        "logger = JSONLLogger(sys.argv[1])\n"
        "for i in range(57): logger.log_metrics({'train/loss': i / 2}, step=i)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [r["train/loss"] for r in read_metrics(tmp_path)] == [i / 2 for i in range(57)]


def test_a_full_disk_is_told_once_and_what_was_written_stays(tmp_path, caplog):
    logger = JSONLLogger(tmp_path)
    logger.log_metrics({"x": 0.0}, step=0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = (tmp_path / "metrics.jsonl").stat().st_size + 10
    resource.setrlimit(resource.RLIMIT_FSIZE, (full, limits[1]))
    try:
        for step in (1, 2, 3):
            logger.log_metrics({"x": 1.0}, step=step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [r.levelno for r in caplog.records] == [logging.ERROR]
    assert "metrics.jsonl" in caplog.text
    logger.log_metrics({"x": 4.0}, step=4)
    caplog.clear()
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 4]
    assert "line 2" in caplog.text


def test_the_table_has_a_row_a_step_and_a_column_a_key(tmp_path):
    logger = JSONLLogger(tmp_path)
    logger.log_metrics({"b": 2.0}, step=5)
    logger.log_metrics({"a": math.nan}, step=7)
    logger.finalize("success")
    with (tmp_path / "metrics.csv").open(newline="") as file:
        table = list(csv.reader(file))
    assert table[0] == ["step", "time", "a", "b"]
    assert [(r[0], r[2], r[3]) for r in table[1:]] == [("5", "", "2.0"), ("7", "nan", "")]
    assert (
        write_csv(tmp_path / "metrics.jsonl", tmp_path / "other.csv").read_text()
        == (tmp_path / "metrics.csv").read_text()
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "metrics.csv",
        "metrics.jsonl",
        "other.csv",
    ]


def test_a_logger_that_logged_nothing_leaves_nothing(tmp_path):
    logger = JSONLLogger(tmp_path / "run")
    logger.log_hyperparams({"lr": 1.0})
    logger.finalize("success")
    assert not (tmp_path / "run").exists()
    assert (logger.name, logger.version, logger.save_dir) == ("run", "", str(tmp_path))


def test_no_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        read_metrics(tmp_path)
