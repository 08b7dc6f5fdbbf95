"""What `contramask doctor` looks at: software, devices, the cluster, disks, W&B."""

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from contramask import __version__
from contramask.tracking.credentials import credentials, server

GIB = 2**30

# Not the package contramask uses, but its twin: these releases stole credentials when imported.
MALWARE = {"lightning": ("2.6.2", "2.6.3")}


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what it is, how it is, and what to do where it is not well."""

    name: str
    text: str
    state: Literal["ok", "note", "warn", "broken"] = "ok"
    advice: str = ""


def software() -> list[Finding]:
    """Versions of what contramask needs, against what it asks for."""
    found = [Finding("contramask", __version__), Finding("python", platform.python_version())]
    for line in importlib.metadata.requires("contramask") or []:
        need = Requirement(line)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        found.append(_package(need))
    for name, versions in MALWARE.items():
        have = _version(name)
        if have in versions:
            advice = f"uninstall {name}, then change every credential this account could read"
            found.append(Finding(name, f"{have} is malware", "broken", advice))
    return found


def _package(need: Requirement) -> Finding:
    have = _version(need.name)
    if have is None:
        return Finding(need.name, "missing", "broken", f"install {need.name}{need.specifier}")
    if not need.specifier.contains(have, prereleases=True):
        text = f"{have}, needed is {need.specifier}"
        return Finding(need.name, text, "broken", f"install {need.name}{need.specifier}")
    return Finding(need.name, have)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> list[Finding]:
    """GPUs with their memory and precision, CPU cores, memory."""
    import torch

    build = torch.version.cuda or torch.version.hip
    found = [Finding("torch build", f"CUDA {build}" if build else "for CPUs only")]
    if torch.cuda.is_available():
        found += [_gpu(i) for i in range(torch.cuda.device_count())]
    elif shutil.which("nvidia-smi"):
        advice = (
            "install a CUDA build of torch"
            if build is None
            else "the driver may be too old for it, or CUDA_VISIBLE_DEVICES may hide the GPUs"
        )
        found.append(Finding("GPU", "nvidia-smi is here, but torch sees none", "warn", advice))
    else:
        found.append(Finding("GPU", "none: training runs on the CPU, in float32", "note"))
    cores = len(os.sched_getaffinity(0))
    found.append(Finding("CPU", f"{cores} cores for this process, {torch.get_num_threads()} used"))
    memory = Path("/proc/meminfo")
    if memory.exists():
        lines = dict(re.findall(r"(\w+):\s+(\d+) kB", memory.read_text()))
        free, total = (int(lines[k]) * 1024 / GIB for k in ("MemAvailable", "MemTotal"))
        found.append(Finding("memory", f"{free:.1f} of {total:.1f} GiB free"))
    return found


def _gpu(index: int) -> Finding:
    import torch

    from contramask.training.flops import peak_flops

    name = torch.cuda.get_device_name(index)
    free, total = torch.cuda.mem_get_info(index)
    text = f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    with torch.cuda.device(index):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if not bf16:
        advice = "set trainer.precision: 16-mixed, or 32-true"
        return Finding(f"GPU {index}", f"{text}, no bfloat16", "warn", advice)
    peak = peak_flops(name, torch.bfloat16)
    known = f"{peak / 1e12:.0f} TFLOP/s" if peak else "its peak is unknown, so no MFU is logged"
    text = f"{text}, bfloat16: {known}"
    if free < 0.8 * total:
        advice = "another process may be using it: see nvidia-smi"
        return Finding(f"GPU {index}", text, "note", advice)
    return Finding(f"GPU {index}", text)


def cluster(environment: Mapping[str, str]) -> list[Finding]:
    """What SLURM, torchrun or another launcher has set, and whether it fits together."""
    if "SLURM_JOB_ID" in environment:
        return _slurm(environment)
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _launcher(environment)
    return [Finding("launcher", "none: one process a visible GPU, started by the trainer")]


def _slurm(environment: Mapping[str, str]) -> list[Finding]:
    get = environment.get
    nodes, job = get("SLURM_JOB_NUM_NODES", "?"), environment["SLURM_JOB_ID"]
    found = [Finding("SLURM job", f"{job} on {nodes} nodes ({get('SLURM_JOB_NODELIST', '?')})")]
    tasks = get("SLURM_NTASKS_PER_NODE") or get("SLURM_TASKS_PER_NODE", "1")
    each = int(re.split(r"\D", tasks)[0] or 1)  # "4(x2)": 4 on each of 2 nodes
    gpus = get("SLURM_GPUS_ON_NODE")
    text = f"{tasks} a node, {get('SLURM_CPUS_PER_TASK', '?')} CPUs each"
    if gpus is None or not gpus.isdigit():
        found.append(Finding("tasks", f"{text}, no GPUs asked for", "note"))
    elif int(gpus) != each:
        advice = f"one task a GPU: #SBATCH --ntasks-per-node={gpus}, and start with srun"
        text = f"{text}, but {gpus} GPUs a node"
        found.append(Finding("tasks", text, "broken", advice))
    else:
        found.append(Finding("tasks", f"{text}, {gpus} GPUs a node"))
    if "SLURM_CPUS_PER_TASK" not in environment:
        advice = "#SBATCH --cpus-per-task=N: SLURM gives one core otherwise, also to data workers"
        found.append(Finding("CPUs", "none asked for", "warn", advice))
    return found


def _launcher(environment: Mapping[str, str]) -> list[Finding]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    text = ", ".join(f"{n}={environment[n]}" for n in names if n in environment)
    missing = [n for n in names if n not in environment]
    if missing:
        advice = f"start with torchrun, which sets {', '.join(missing)} too, or unset all of them"
        return [Finding("launcher", f"{text}; the others are missing", "broken", advice)]
    rank, world = environment["RANK"], environment["WORLD_SIZE"]
    if not (rank.isdigit() and world.isdigit() and int(rank) < int(world)):
        return [Finding("launcher", text, "broken", "RANK goes from 0 to WORLD_SIZE - 1")]
    return [Finding("launcher", text)]


def disks(root: Path) -> list[Finding]:
    """Whether runs can be written, and what limits the data workers."""
    found = [
        _writable("runs", root, least=20),
        _writable("$TMPDIR", Path(tempfile.gettempdir()), least=1),
    ]
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free / GIB
        advice = "data workers pass batches through it: docker run --shm-size=16g, or fewer workers"
        found.append(_warned(free < 1, str(shared), f"{free:.1f} GiB free", advice))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    found.append(_warned(soft < 1024, "open files", f"at most {soft}", "ulimit -n 65536"))
    return found


def _warned(bad: bool, name: str, text: str, advice: str) -> Finding:
    return Finding(name, text, "warn", advice) if bad else Finding(name, text)


def _writable(name: str, folder: Path, *, least: int) -> Finding:
    """Write and remove a file in a folder, or in the nearest one that exists; `least` in GiB."""
    there = next(p for p in [folder.absolute(), *folder.absolute().parents] if p.is_dir())
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".contramask-") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        advice = "choose another with --root" if name == "runs" else f"set {name} to another folder"
        return Finding(name, f"{folder} cannot be written: {error.strerror}", "broken", advice)
    free = shutil.disk_usage(there).free / GIB
    text = f"{folder}, {free:.1f} GiB free"
    if free < least:
        return Finding(name, text, "warn", f"less than {least} GiB: checkpoints may not fit")
    return Finding(name, text)


def wandb(environment: Mapping[str, str]) -> list[Finding]:
    """Whether runs will be sent, and where to."""
    mode, key = environment.get("WANDB_MODE", "auto"), credentials()
    if mode in ("offline", "disabled", "dryrun"):
        return [Finding("W&B", f"$WANDB_MODE is {mode}", "note")]
    if key is None:
        advice = "wandb login; without it runs are recorded offline, to be sent by wandb sync"
        return [Finding("W&B", f"no API key for {server()}", "note", advice)]
    return [Finding("W&B", f"{server()}, key from {key}")]
