"""The main job from the command line: pretrain, be stopped, go on, probe. Bitwise the same run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from contramask.cli.probe import main as probe
from contramask.tracking.jsonl import read_metrics
from tests.conftest import REPO

STEPS = 24
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}


def command(data: list[str], root: Path, name: str, workers: int) -> list[str]:
    recipe = REPO / "configs" / "pretrain" / "hybrid_mocov3_simmim_cifar10.yaml"
    return [
        *(sys.executable, "-m", "contramask", "pretrain", "-c", str(recipe)),
        *("-c", str(REPO / "configs" / "debug.yaml"), *data),
        *("--root", str(root), "--name", name, "--data.workers", str(workers)),
        *("--trainer.max_steps", str(STEPS), "--checkpoint.every", "5", "--online.every", "12"),
        *("--trainer.accumulate_grad_batches", "2", "--pictures.every", "12"),
        *("--analysis.every", "12", "--analysis.figures", "true", "--watchdog.every", "5"),
        *("--model.backbone.timm.drop_path_rate", "0.2"),
    ]


def train(*arguments: object) -> None:
    done = subprocess.run(
        command(*arguments), env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == STEPS
    moments = checkpoint["optimizer_states"][0]["state"]
    flat = {f"adam/{i}/{k}": v for i, state in moments.items() for k, v in state.items()}
    return checkpoint["state_dict"] | flat


@pytest.fixture(scope="module")
def straight(shards, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    train(["--data.train", shards["train"], "--data.val", shards["val"]], root, "straight", 0)
    return root / "straight"


def interrupt(arguments: list[str], run: Path, how: signal.Signals) -> int:
    """Stop a run some steps after its first checkpoint; its exit status."""
    process = subprocess.Popen(
        arguments, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if list(run.glob("checkpoints/step-*05.ckpt")):
            break
        time.sleep(0.02)
    process.send_signal(how)
    return process.wait(timeout=60)


@pytest.mark.parametrize(
    ("how", "workers", "status"),
    [(signal.SIGTERM, 2, 128 + signal.SIGTERM), (signal.SIGKILL, 0, -signal.SIGKILL)],
)
def test_stopped_and_continued_is_straight(straight, data, tmp_path, how, workers, status):
    run = tmp_path / "stopped"
    found = interrupt(command(data, tmp_path, "stopped", workers), run, how)
    assert found == status
    assert not (run / "checkpoints" / f"step-{STEPS:08d}.ckpt").exists()
    train(data, tmp_path, "stopped", workers)
    expected, resumed = weights(straight), weights(run)
    assert expected.keys() == resumed.keys()
    differ = [k for k in expected if not torch.equal(expected[k], resumed[k])]
    assert not differ
    rows, straight_rows = (read_metrics(r / "metrics.jsonl") for r in (run, straight))
    losses = [
        {r["step"]: r["train/loss"] for r in x if "train/loss" in r} for x in (rows, straight_rows)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS
    # What watches says the same too, of the start that is no more as of the weights at hand.
    looks = [sorted((r / "analysis").glob("step-*.json"))[-1] for r in (run, straight)]
    assert looks[0].name == f"step-{STEPS:08d}.json"
    assert looks[0].read_text() == looks[1].read_text()
    assert "cka/initial" in looks[0].read_text()


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_probe(straight, data, kind, capsys):
    options = ["--ks", "[1,5]"] if kind == "knn" else ["--recipe.epochs", "3"]
    probe(
        [
            kind,
            str(straight),
            *data,
            "--data.workers",
            "0",
            "--data.batch_size",
            "32",
            "--trainer.accelerator",
            "cpu",
            *options,
        ]
    )
    result = json.loads(next((straight / "probes").glob(f"{kind}-*.json")).read_text())
    assert result["step"] == STEPS
    assert result["values"]["images"] == 64
    assert "centre crop 32" in result["protocol"]
    assert "protocol" in capsys.readouterr().out


def test_another_configuration_is_refused(straight, data, capsys):
    from contramask.cli.main import main

    arguments = command(data, straight.parent, "straight", 0)[3:]
    with pytest.raises(SystemExit):
        main([*arguments, "--model.optim.decay", "0.3"])
    error = capsys.readouterr().err
    assert "model.optim.decay: 0.05 -> 0.3" in error
