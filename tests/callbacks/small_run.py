"""A small run with all that stops and continues one, as a function and in processes.

The data are a closed form of the micro-batch's number, the position follows from `global_step`.
"""

import json
import logging
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from contramask.callbacks.checkpoint import Checkpoints
from contramask.callbacks.finite import FiniteLoss
from contramask.callbacks.preemption import Preemption, environment_plugins
from contramask.checkpoints.files import newest

IMAGES = 3  # of a micro-batch


@dataclass(frozen=True)
class Plan:
    """What a run does, and what happens to it."""

    root: str
    steps: int = 12
    every: int = 4
    keep: int | None = 2
    accumulate: int = 1
    workers: int = 0
    ranks: int = 1
    nodes: int = 1
    port: int = 0
    optimizer: str = "fused"
    ballast: int = 0  # MiB of weights, which make a save slow
    pause: float = 0.0  # seconds in each step
    validate: int = 0  # micro-batches between validations
    stop_at: int = -1  # the update in which this process sends itself SIGTERM
    stop_in_setup: bool = False
    nan_at: int = -1  # the update in which a loss is NaN
    nan_rank: int = 0
    nan_in: str = "loss"
    accelerator: str = "cpu"
    room: int = -1  # bytes a file may have, at most: a full disk


class Stream(IterableDataset):
    """Micro-batches start + rank, start + rank + ranks, ...; for ever."""

    def __init__(self, start: int, rank: int, ranks: int):
        self.start, self.rank, self.ranks = start, rank, ranks

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = torch.utils.data.get_worker_info()
        k, stride = (info.id, info.num_workers) if info else (0, 1)
        while True:
            number = self.start + self.rank + self.ranks * k
            draw = torch.Generator().manual_seed(number)
            x = torch.randn(IMAGES, 6, generator=draw)
            yield {"x": x, "y": x.sin().sum(1, keepdim=True), "number": number}
            k += stride


def shield(worker: int) -> None:
    """Signals are for the trainer; a worker that dies of one takes it down."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class Small(pl.LightningModule):
    """Two linear layers, two objectives."""

    def __init__(self, plan: Plan):
        super().__init__()
        torch.manual_seed(5)
        self.plan = plan
        self.net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))
        self.ballast = nn.Parameter(torch.zeros(plan.ballast << 18), requires_grad=False)
        self.scores: dict[int, float] = {}  # by step: what validation will find

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        plan, here = self.plan, self.global_step
        time.sleep(plan.pause)
        if here == plan.stop_at - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        out = self.net(batch["x"])
        losses = {"fit": (out - batch["y"]).square().mean(), "small": out.abs().mean()}
        if here == plan.nan_at - 1 and self.global_rank == plan.nan_rank:
            # The gradient of the root at 0 is infinite, and times 0 NaN; its value is 0.
            poison = (
                (out * 0).sum().abs().sqrt() if plan.nan_in == "gradient" else out.sum() * torch.nan
            )
            losses["small"] = losses["small"] + poison
        total = losses["fit"] + 0.1 * losses["small"]
        self.trace(number=int(batch["number"]), loss=total)
        return {"loss": total, "losses": {k: v.detach() for k, v in losses.items()}}

    def trace(self, *, number: int, loss: Tensor) -> None:
        file = Path(self.plan.root) / f"trace-{self.global_rank}.jsonl"
        with open(file, "a", encoding="utf-8") as trace:
            line = {"step": self.global_step, "number": number, "loss": loss.item().hex()}
            trace.write(json.dumps(line) + "\n")

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        score = self.scores.get(self.global_step, 0.0)
        self.log("score", score, batch_size=IMAGES, sync_dist=self.plan.ranks > 1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        match self.plan.optimizer:
            case "fused":
                return torch.optim.AdamW(self.net.parameters(), lr=0.02, fused=True)
            case "plain":
                return torch.optim.AdamW(self.net.parameters(), lr=0.02)
            case _:
                return torch.optim.SGD(self.net.parameters(), lr=0.02, momentum=0.9)

    def train_dataloader(self) -> DataLoader:
        if self.plan.stop_in_setup:
            os.kill(os.getpid(), signal.SIGTERM)
        plan, start = self.plan, self.global_step * self.plan.accumulate * self.plan.ranks
        stream = Stream(start, self.global_rank, plan.ranks)
        return DataLoader(stream, batch_size=None, num_workers=plan.workers, worker_init_fn=shield)

    def val_dataloader(self) -> DataLoader:
        return DataLoader([next(iter(Stream(0, 0, 1)))], batch_size=None)


def make(plan: Plan, *callbacks: pl.Callback, **checkpoints: Any) -> tuple[pl.Trainer, Small]:
    """A trainer and its module, with all of a run's guards and savers."""
    trainer = pl.Trainer(
        accelerator=plan.accelerator,
        devices=plan.ranks // plan.nodes,
        num_nodes=plan.nodes,
        plugins=environment_plugins(),
        strategy="ddp" if plan.ranks > 1 else "auto",
        max_steps=plan.steps,
        accumulate_grad_batches=plan.accumulate,
        val_check_interval=plan.validate or None,
        check_val_every_n_epoch=None if plan.validate else 1,
        limit_val_batches=1 if plan.validate else 0,
        num_sanity_val_steps=0,
        default_root_dir=plan.root,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[
            FiniteLoss(),
            Preemption(),  # Lightning moves it behind the others
            *callbacks,
            Checkpoints(every=plan.every, keep=plan.keep, **checkpoints),
        ],
    )
    return trainer, Small(plan)


def train(plan: Plan, *callbacks: pl.Callback, **checkpoints: Any) -> Small:
    """Start the run, or go on with it."""
    Path(plan.root).mkdir(parents=True, exist_ok=True)
    trainer, module = make(plan, *callbacks, **checkpoints)
    trainer.fit(module, ckpt_path=newest(Path(plan.root) / "checkpoints"))
    return module


def process(plan: Plan, rank: int) -> None:
    """One rank in a process of its own, whose words go to `log-RANK.txt`."""
    root = Path(plan.root)
    root.mkdir(parents=True, exist_ok=True)
    handle = os.open(root / f"log-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of data workers: not this process's
    warnings.simplefilter("ignore")
    if plan.ranks > 1:
        os.environ.update(
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(plan.port),
            WORLD_SIZE=str(plan.ranks),
            NODE_RANK="0",
            LOCAL_RANK=str(rank),
            GLOO_SOCKET_IFNAME="lo",
        )
    if plan.room >= 0:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (plan.room, resource.RLIM_INFINITY))
    train(plan)


def start(plan: Plan) -> list[multiprocessing.Process]:
    """All ranks of a run."""
    return launch([plan] * plan.ranks)


def launch(plans: list[Plan]) -> list[multiprocessing.Process]:
    """A process for each rank, forked from a server that has imported torch once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ranks = [context.Process(target=process, args=(plan, rank)) for rank, plan in enumerate(plans)]
    for rank in ranks:
        rank.start()
    return ranks


def finish(ranks: list[multiprocessing.Process], seconds: float = 60) -> list[int | None]:
    """Their exit codes, once all are done."""
    for rank in ranks:
        rank.join(seconds)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    return codes


def steps(root: Path, rank: int = 0) -> list[tuple[int, int, str]]:
    """(update, micro-batch, loss) of every micro-batch trained, in order, over all starts."""
    lines = (root / f"trace-{rank}.jsonl").read_text("utf-8").splitlines()
    return [(x["step"], x["number"], x["loss"]) for x in map(json.loads, lines)]


def wait_for(path: Path, seconds: float = 30) -> None:
    """Until a file is there."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"no {path} after {seconds} s"
        time.sleep(0.01)
