"""The doctor finds what is broken, says what to do, and ends with status 1 then alone."""

import importlib.metadata
import io
import os
import tarfile
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from contramask.cli import doctor, doctor_checks
from contramask.cli.doctor_checks import cluster, devices, disks, software, wandb


def states(findings) -> dict[str, str]:
    return {f.name: f.state for f in findings}


@pytest.fixture
def versions(monkeypatch):
    """Give packages other versions; None: not installed."""
    real = importlib.metadata.version

    def pretend(**given: str | None) -> None:
        def version(name: str) -> str:
            have = given[name] if name in given else real(name)
            if have is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return have

        monkeypatch.setattr(importlib.metadata, "version", version)

    return pretend


def test_this_environment_is_sound():
    found = software()
    assert {f.state for f in found} == {"ok"}
    assert {"contramask", "python", "torch", "timm", "wandb", "webdataset"} <= {
        f.name for f in found
    }
    assert "s3fs" not in {f.name for f in found}  # an extra


def test_missing_and_old_packages_are_broken(versions):
    versions(timm=None, torch="2.3.0")
    found = {f.name: f for f in software()}
    assert (found["timm"].state, found["timm"].text) == ("broken", "missing")
    assert found["timm"].advice.startswith("install timm>=")
    assert found["torch"].state == "broken"
    assert "2.3.0, needed is >=" in found["torch"].text


def test_the_malware_is_named(versions):
    versions(lightning="2.6.3")
    assert states(software())["lightning"] == "broken"
    versions(lightning="2.6.1")
    assert "lightning" not in states(software())


def test_a_gpu_that_torch_does_not_see_is_a_warning(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor_checks.shutil, "which", lambda name: None)
    assert states(devices())["GPU"] == "note"
    monkeypatch.setattr(doctor_checks.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert states(devices())["GPU"] == "warn"


@pytest.mark.parametrize(
    ("name", "bf16", "free", "state", "text"),
    [
        ("NVIDIA H100 80GB HBM3", True, 79, "ok", "bfloat16: 989 TFLOP/s"),
        ("NVIDIA H100 80GB HBM3", True, 20, "note", "20.0 of 80.0 GiB free"),
        ("A New One", True, 79, "ok", "its peak is unknown"),
        ("Tesla V100-SXM2-16GB", False, 79, "warn", "no bfloat16"),
    ],
)
def test_gpus_are_told_with_memory_and_precision(monkeypatch, name, bf16, free, state, text):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: name)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (free << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    found = {f.name: f for f in devices()}
    assert found["GPU 1"].state == state
    assert text in found["GPU 1"].text


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_CPUS_PER_TASK": "8",
    "SLURM_GPUS_ON_NODE": "4",
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {"SLURM job": "ok", "tasks": "ok"}),
        ({"SLURM_TASKS_PER_NODE": "1(x2)"}, {"SLURM job": "ok", "tasks": "broken"}),
        ({"SLURM_NTASKS_PER_NODE": "2"}, {"SLURM job": "ok", "tasks": "broken"}),
        ({"SLURM_GPUS_ON_NODE": None}, {"SLURM job": "ok", "tasks": "note"}),
        ({"SLURM_CPUS_PER_TASK": None}, {"SLURM job": "ok", "tasks": "ok", "CPUs": "warn"}),
    ],
)
def test_tasks_of_slurm_must_be_gpus(change, expected):
    environment = {k: v for k, v in {**SLURM, **change}.items() if v is not None}
    found = cluster(environment)
    assert states(found) == expected
    advice = next((f.advice for f in found if f.state == "broken"), "--ntasks-per-node=4")
    assert "--ntasks-per-node=4" in advice


TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("environment", "state"),
    [
        ({}, "ok"),
        (TORCHRUN, "ok"),
        ({**TORCHRUN, "RANK": "4"}, "broken"),
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"}, "broken"),
    ],
)
def test_ranks_must_fit_their_world(environment, state):
    assert states(cluster(environment)) == {"launcher": state}


def test_a_folder_that_cannot_be_written_is_broken(tmp_path, monkeypatch):
    assert states(disks(tmp_path / "not" / "yet"))["runs"] in ("ok", "warn")
    assert list(tmp_path.iterdir()) == []

    def refuse(**given: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor_checks.tempfile, "NamedTemporaryFile", refuse)
    found = {f.name: f for f in disks(tmp_path)}
    assert (found["runs"].state, found["$TMPDIR"].state) == ("broken", "broken")
    assert "cannot be written: Permission denied" in found["runs"].text
    assert "--root" in found["runs"].advice


def test_a_full_disk_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(
        doctor_checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=2 << 30)
    )
    assert states(disks(tmp_path))["runs"] == "warn"


def test_the_state_of_wandb(tmp_path, monkeypatch):
    for name in [n for n in os.environ if n.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (missing,) = wandb({})
    assert (missing.state, "wandb login" in missing.advice) == ("note", True)
    assert states(wandb({"WANDB_MODE": "offline"})) == {"W&B": "note"}
    monkeypatch.setenv("WANDB_API_KEY", "secret" * 7)
    (found,) = wandb({})
    assert (found.state, "$WANDB_API_KEY" in found.text) == ("ok", True)
    assert "secret" not in found.text


def shard(path, good: int, bad: int) -> str:
    with tarfile.open(path, "w") as tar:
        for i in range(good + bad):
            stream = io.BytesIO()
            image = np.full((9, 11, 3), 7 * i, dtype=np.uint8)
            Image.fromarray(image).save(stream, "PNG")
            content = stream.getvalue() if i < good else b"no image"
            for suffix, data in (("png", content), ("cls", b"1")):
                member = tarfile.TarInfo(f"{i:03d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(path)


def test_shards_are_looked_at(tmp_path):
    from contramask.data.index import build_index

    pattern = shard(tmp_path / "train-000000.tar", good=5, bad=0)
    bare = states(doctor.data(pattern))
    assert bare == {"index": "warn", "samples": "ok"}
    build_index(pattern)
    found = {f.name: f for f in doctor.data(pattern)}
    assert states(found.values()) == {"index": "ok", "samples": "ok"}
    assert found["index"].text == "1 shards, 5 samples, sizes as indexed, 2 classes"
    assert found["samples"].text == "5 decoded"
    with (tmp_path / "train-000000.tar").open("ab") as file:
        file.write(b"more")
    assert states(doctor.data(pattern)) == {pattern: "broken"}
    nothing = str(tmp_path / "none-*.tar")
    assert states(doctor.data(nothing)) == {nothing: "broken"}


@pytest.mark.parametrize(("good", "state"), [(4, "warn"), (0, "broken")])
def test_bad_images_are_counted(tmp_path, good, state):
    from contramask.data.index import build_index

    pattern = shard(tmp_path / "a-000000.tar", good=good, bad=1)
    build_index(pattern)
    found = doctor.data(pattern)
    assert found[-1].state == state
    if good:
        assert found[-1].text == "4 of 5 samples decoded"


def test_the_whole_is_readable_in_a_log_and_tells_by_its_status(tmp_path, capsys, monkeypatch):
    for name in [n for n in os.environ if n.startswith(("WANDB", "SLURM", "RANK", "WORLD"))]:
        monkeypatch.delenv(name)
    doctor.main(["--root", str(tmp_path)])
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert all(f"\n{group}" in f"\n{text}" for group in ("Software", "Devices", "Disks"))
    assert "BROKEN" not in text
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--root", str(tmp_path)])
    text = capsys.readouterr().out
    assert ended.value.code == 1
    assert (
        "BROKEN  launcher" in " ".join(text.split(" " * 2)).replace(" " * 2, "  ")
        or "BROKEN" in text
    )
    assert text.rstrip().splitlines()[-1].startswith("1 broken")
