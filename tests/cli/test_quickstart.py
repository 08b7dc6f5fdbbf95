"""The quickstart, shortened: everything it promises is there, and the same numbers come twice."""

import csv
import subprocess
import sys

import pytest

from contramask.cli.quickstart import RUNS, quickstart
from contramask.cli.quickstart_report import COLUMNS


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    outs = [tmp_path_factory.mktemp("quick") / "start" for _ in range(2)]
    rows = [quickstart(out, seed=3, steps=4, images=256) for out in outs]
    return outs, rows


def test_the_same_numbers_twice(twice):
    outs, rows = twice
    assert rows[0] == rows[1]
    assert (outs[0] / "results.csv").read_text() == (outs[1] / "results.csv").read_text()


def test_what_it_leaves(twice):
    (out, _), (rows, _) = twice
    assert [row["encoder"] for row in rows] == ["random init", *RUNS.values()]
    with open(out / "results.csv", newline="") as file:
        assert next(csv.reader(file)) == ["encoder", *COLUMNS]
    for name in ("curves.png", "shape_and_texture.png"):
        assert (out / name).stat().st_size > 5000
    for name in RUNS:
        assert list((out / name / "pictures").glob("views*"))
        assert (out / name / "backbone.safetensors").is_file()
    assert list((out / "hybrid" / "pictures").glob("reconstruct*"))
    assert list((out / "data").glob("train-*.tar"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_command_of_the_readme(tmp_path):
    """At its full length: contrast reads texture, masks read shape, both better than at random."""
    command = [sys.executable, "-m", "contramask", "quickstart"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with open(tmp_path / "runs" / "quickstart" / "results.csv", newline="") as file:
        rows = {row["encoder"]: row for row in csv.DictReader(file)}
    start, contrast, masked = (rows[k] for k in ("random init", RUNS["mocov3"], RUNS["mae"]))
    assert float(contrast["texture k-NN"]) > float(start["texture k-NN"]) + 10
    assert float(masked["shape k-NN"]) > float(start["shape k-NN"]) + 3
    assert "What to try next" in done.stdout
