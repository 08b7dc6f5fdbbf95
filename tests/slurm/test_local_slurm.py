"""A small run through a real SLURM on this machine: two nodes, a rank on each.

Needs root and SLURM's daemons (`scripts/slurm_local.sh install`); else skipped, with the reason.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from contramask.checkpoints import files
from tests.callbacks.small_run import Plan, finish, start, steps

REPO = Path(__file__).resolve().parents[2]
LOCAL = REPO / "scripts" / "slurm_local.sh"

missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)}: see {LOCAL.name} install"),
    pytest.mark.skipif(os.geteuid() != 0, reason="SLURM's daemons need root"),
]


class Slurm:
    """A running SLURM, and a folder in which jobs are submitted."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self.environment = folder, environment
        (folder / "slurm").symlink_to(REPO / "slurm")
        program = folder / "contramask"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.slurm.program "$@"\n')
        program.chmod(0o755)

    def ask(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, name: str, **plan: object) -> int:
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(plan))
        size = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=2"]
        return int(self.ask("sbatch", "--parsable", *size, "slurm/pretrain.sbatch", f"{name}.yaml"))

    def about(self, job: int, key: str) -> str:
        match = re.search(rf"\b{key}=(\S+)", self.ask("scontrol", "show", "job", str(job), "-o"))
        assert match is not None
        return match[1]

    def wait(self, job: int, key: str, value: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while (now := self.about(job, key)) != value:
            assert time.monotonic() < end, f"{key} is {now}, not {value}\n{self.output(job)}"
            time.sleep(0.2)

    def run(self, name: str, job: int) -> Path:
        return self.folder / "runs" / f"{name}-{job}"

    def wait_for_updates(self, root: Path, number: int) -> None:
        end = time.monotonic() + 120
        while not (root / "trace-0.jsonl").exists() or len(steps(root)) < number:
            assert time.monotonic() < end, f"fewer than {number} updates in {root}"
            time.sleep(0.1)

    def output(self, job: int) -> str:
        file = self.folder / f"slurm-contramask-{job}.out"
        return file.read_text() if file.exists() else ""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    environment = {
        **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        "SLURM_LOCAL": str(folder / "state"),
        "SLURM_LOCAL_PORT": str(20000 + 7 * (os.getpid() % 1000)),
        "SLURM_CONF": str(folder / "state" / "slurm.conf"),
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPO),
        "CONTRAMASK": str(folder / "work" / "contramask"),
    }
    (folder / "work").mkdir()
    try:
        subprocess.run([str(LOCAL), "up"], env=environment, check=True, capture_output=True)
        yield Slurm(folder / "work", environment)
    finally:
        subprocess.run([str(LOCAL), "down"], env=environment, check=True)


def test_a_job_runs_and_passes_its_code_on(slurm: Slurm) -> None:
    job = slurm.submit("plain", steps=3)
    slurm.wait(job, "JobState", "COMPLETED")
    assert len(steps(slurm.run("plain", job), 1)) == 3
    job = slurm.submit("wrong", steps=3, nan_at=2, nan_rank=1)
    slurm.wait(job, "JobState", "FAILED")
    assert slurm.about(job, "ExitCode") == "1:0"
    assert "update 2: loss of 'small' is NaN on rank 1" in slurm.output(job)


@pytest.mark.slow
def test_interrupted_in_every_way_it_is_the_straight_run(slurm: Slurm, tmp_path: Path) -> None:
    plan = {"steps": 600, "every": 1000, "workers": 1}
    port = 27000 + os.getpid() % 900
    straight = Plan(str(tmp_path), ranks=2, port=port, **plan)
    assert finish(start(straight)) == [0, 0]

    job = slurm.submit("again", pause=0.05, **plan)
    root = slurm.run("again", job)
    slurm.wait_for_updates(root, 50)
    slurm.ask("scancel", "--signal=USR1", str(job))  # as before the end of its time
    slurm.wait(job, "Restarts", "1")
    slurm.wait_for_updates(root, 200)
    # Preempted by a job of a higher partition that takes both nodes.
    size = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=4", "--output=/dev/null"]
    slurm.ask("sbatch", "--partition=high", *size, "--wrap=srun sleep 1")
    slurm.wait(job, "Restarts", "2")
    slurm.wait(job, "JobState", "COMPLETED", 180)

    for rank in (0, 1):
        assert steps(root, rank) == steps(tmp_path, rank), slurm.output(job)
    one, two = (files.load(x / "checkpoints" / "last.ckpt") for x in (root, tmp_path))
    for name, value in one["state_dict"].items():
        assert value.equal(two["state_dict"][name]), name
    assert slurm.output(job).count("will run again") == 2


@pytest.mark.slow
def test_a_cancelled_job_saves_and_stays_dead(slurm: Slurm) -> None:
    job = slurm.submit("cancelled", steps=6000, every=10000, pause=0.02)
    root = slurm.run("cancelled", job)
    slurm.wait_for_updates(root, 20)
    slurm.ask("scancel", str(job))
    slurm.wait(job, "JobState", "CANCELLED")
    time.sleep(8)  # longer than a requeued job waits
    assert slurm.about(job, "JobState") == "CANCELLED"
    assert slurm.about(job, "Restarts") == "0"
    step = files.load(root / "checkpoints" / "last.ckpt")["global_step"]
    assert step == len(steps(root))
    assert "is not asked to run again: JobState=" in slurm.output(job)
