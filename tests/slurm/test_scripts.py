"""The batch files and shell scripts without a cluster: SLURM's programs are played."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SCRIPTS = [*sorted((REPO / "slurm").glob("*.s*")), REPO / "scripts" / "slurm_local.sh"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_can_read_it(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "set -euo pipefail" in script.read_text()


def test_shellcheck_has_nothing_to_say() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["pretrain.sbatch", "array.sbatch"])
def test_what_an_interrupted_job_needs(name: str) -> None:
    lines = (REPO / "slurm" / name).read_text().splitlines()
    for option in ("--requeue", "--signal=SIGUSR1@90", "--open-mode=append"):
        assert f"#SBATCH {option}" in lines


class Cluster:
    """Runs a batch file as SLURM would, with an `srun` and a `contramask` that note their calls."""

    def __init__(self, folder: Path):
        self.folder, self.code = folder, 0
        self.calls = folder / "calls.txt"
        self.environment: dict[str, str] = {}
        (folder / "slurm").symlink_to(REPO / "slurm")

    def play(self, name: str, text: str) -> None:
        program = self.folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/bash\n{text}\n")
        program.chmod(0o755)

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        self.play("scontrol", 'printf "node7\\nnode8\\n"')
        self.play(
            "srun",
            f'printf "%q " srun "$@" >> {self.calls}; echo >> {self.calls}\n'
            f"env > {self.folder}/env.txt\n"
            'while [[ $1 == -* ]]; do shift; done\n[[ $1 == bash ]] && exec "$@"\n'
            f"exit {self.code}",
        )
        environment = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_NTASKS_PER_NODE": "4",
            "SLURM_CPUS_PER_TASK": "6",
            "TMPDIR": str(self.folder),
            **variables,
        }
        done = subprocess.run(
            ["bash", f"slurm/{script}", *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        if (self.folder / "env.txt").exists():
            pairs = (self.folder / "env.txt").read_text().splitlines()
            self.environment = dict(line.split("=", 1) for line in pairs if "=" in line)
        return done

    def called(self) -> list[list[str]]:
        return [shlex.split(line) for line in self.calls.read_text().splitlines()]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_pretrain(cluster: Cluster) -> None:
    done = cluster.run("pretrain.sbatch", "configs/mae.yaml", "--model.x", "[1, 2]")
    assert done.returncode == 0, done.stderr
    (call,) = cluster.called()
    assert call == [
        *("srun", "--kill-on-bad-exit=1", "contramask", "pretrain", "-c", "configs/mae.yaml"),
        *("--name", "mae-4711", "--resume", "auto"),
        *("--trainer.devices", "4", "--trainer.num_nodes", "2", "--model.x", "[1, 2]"),
    ]
    expected = {
        "MASTER_ADDR": "node7",
        "MASTER_PORT": "24711",
        "OMP_NUM_THREADS": "6",
        "SRUN_CPUS_PER_TASK": "6",
    }
    assert {name: cluster.environment[name] for name in expected} == expected


def test_what_is_set_already_stays(cluster: Cluster) -> None:
    given = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "777", "OMP_NUM_THREADS": "1"}
    cluster.run("pretrain.sbatch", "mae.yaml", CONTRAMASK="/env/bin/contramask", **given)
    assert {name: cluster.environment[name] for name in given} == given
    assert cluster.called()[0][2] == "/env/bin/contramask"


@pytest.mark.parametrize("code", [0, 1, 2, 75, 143])
def test_the_exit_code_is_passed_on(cluster: Cluster, code: int) -> None:
    cluster.code = code
    assert cluster.run("pretrain.sbatch", "mae.yaml").returncode == code
    assert cluster.run("probe.sbatch", "runs/a", PROBES="knn").returncode == code


def test_without_a_configuration(cluster: Cluster) -> None:
    done = cluster.run("pretrain.sbatch")
    assert done.returncode != 0
    assert "usage: sbatch slurm/pretrain.sbatch CONFIG" in done.stderr
    assert not cluster.calls.exists()


def test_an_array_takes_its_line(cluster: Cluster) -> None:
    (cluster.folder / "runs.txt").write_text(
        "a.yaml\nsub/b.yaml --data.train 'a-*.tar' --model.optim.lr.peak 3e-4 --x '[1, 2]'\nc.yaml"
    )
    task = {"SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "2"}
    assert cluster.run("array.sbatch", "runs.txt", **task).returncode == 0
    (call,) = cluster.called()
    assert call[call.index("-c") + 1] == "sub/b.yaml"
    assert call[call.index("--name") + 1] == "b-4700_2"
    assert call[-6:-4] == ["--data.train", "a-*.tar"]
    assert call[-4:] == ["--model.optim.lr.peak", "3e-4", "--x", "[1, 2]"]
    done = cluster.run("array.sbatch", "runs.txt", SLURM_ARRAY_TASK_ID="4")
    assert done.returncode == 2
    assert "runs.txt has no line 4" in done.stderr


def test_probes(cluster: Cluster) -> None:
    options = ["--data.train", "train-*.tar", "--data.val", "val-*.tar"]
    assert cluster.run("probe.sbatch", "runs/a", *options).returncode == 0
    head = ["srun", "--kill-on-bad-exit=1", "contramask", "probe"]
    assert cluster.called() == [[*head, kind, "runs/a", *options] for kind in ("knn", "linear")]


# Staging


def shards(folder: Path, *, index: bool = True) -> list[Path]:
    folder.mkdir()
    made = [folder / f"train-{i:06d}.tar" for i in range(3)]
    for i, shard in enumerate(made):
        shard.write_bytes(bytes([i]) * (1000 + i))
    if index:
        sums = [{"sha256": hashlib.sha256(s.read_bytes()).hexdigest()} for s in made]
        (folder / "train.index.json").write_text(json.dumps({"shards": sums}, indent=1))
    return made


def stage(target: Path, sources: list[Path]) -> subprocess.CompletedProcess:
    command = ["bash", str(REPO / "slurm" / "stage.sh"), str(target), *map(str, sources)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("index", [True, False])
def test_stage_copies_shards_and_index(tmp_path: Path, index: bool) -> None:
    made = shards(tmp_path / "net", index=index)
    done = stage(tmp_path / "disk", made)
    assert done.returncode == 0, done.stderr
    assert "3 shards are in" in done.stderr
    for path in (tmp_path / "net").iterdir():
        assert (tmp_path / "disk" / path.name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "disk").iterdir())) == len(list((tmp_path / "net").iterdir()))


def test_stage_refuses_a_shard_that_is_not_as_indexed(tmp_path: Path) -> None:
    made = shards(tmp_path / "net")
    made[1].write_bytes(b"x" + made[1].read_bytes()[1:])
    done = stage(tmp_path / "disk", made)
    assert done.returncode != 0
    assert "train-000001.tar arrives with SHA-256" in done.stderr
    assert "train.index.json" in done.stderr
    assert not (tmp_path / "disk" / "train-000001.tar").exists()
    assert not list((tmp_path / "disk").glob("*.part.*"))


def test_stage_keeps_what_is_whole_and_replaces_what_is_not(tmp_path: Path) -> None:
    made = shards(tmp_path / "net")
    disk = tmp_path / "disk"
    assert stage(disk, made).returncode == 0
    (disk / "train-000002.tar").write_bytes(b"cut")
    (disk / "train-000001.tar.part.99").write_bytes(b"left by a job that was killed")
    before = (disk / "train-000000.tar").stat().st_ino
    assert stage(disk, made).returncode == 0
    assert (disk / "train-000000.tar").stat().st_ino == before
    assert (disk / "train-000002.tar").read_bytes() == made[2].read_bytes()
    assert not list(disk.glob("*.part.*"))


def test_stage_names_a_missing_shard(tmp_path: Path) -> None:
    done = stage(tmp_path / "disk", [tmp_path / "net" / "train-*.tar"])
    assert done.returncode == 1
    assert "no shard" in done.stderr


def test_stage_asks_for_room_first(tmp_path: Path) -> None:
    shards(tmp_path / "net", index=False)
    vast = tmp_path / "net" / "train-000009.tar"
    with open(vast, "wb") as file:
        file.truncate(1 << 43)  # sparse: 8 TiB that take no room here
    done = stage(tmp_path / "disk", [vast])
    assert done.returncode == 1
    assert "the shards take 8388608 MiB, " in done.stderr


def test_a_staged_run_reads_from_the_disk(cluster: Cluster) -> None:
    shards(cluster.folder / "net")
    pattern = f"{cluster.folder}/net/train-*.tar"
    done = cluster.run("pretrain.sbatch", "mae.yaml", STAGE=pattern)
    assert done.returncode == 0, done.stderr
    staging, training = cluster.called()
    assert staging[:4] == ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    disk = cluster.folder / "contramask-4711"
    assert training[-2:] == ["--data.train", f"{disk}/train-*.tar"]
    assert len(list(disk.glob("train-*.tar"))) == 3
    assert (disk / "train.index.json").exists()
