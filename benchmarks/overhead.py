"""What the framework costs: MAE ViT-S/16 under `pretrain`'s module, and in a bare loop.

    uv run python benchmarks/overhead.py [--batch 16] [--steps 6] [--rounds 5]

Both sides run the same modules on the same images from memory, in turn, in one process; the figure
is the median over rounds of the ratio of images/s (framework / bare). Start-up is not counted.
"""

import argparse
import functools
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset

from contramask.callbacks.finite import FiniteLoss
from contramask.callbacks.progress import Progress
from contramask.callbacks.throughput import Throughput
from contramask.masks import RandomMasking
from contramask.models.vit import VisionTransformer
from contramask.objectives.mae import MAE
from contramask.optim import Optim
from contramask.tracking.jsonl import JSONLLogger
from contramask.training.pretraining import Pretraining
from contramask.types import Batch, Step

READY = 2  # first steps, not counted


class Memory(IterableDataset):
    """One batch in memory, over and over, as the stream would hand it out."""

    def __init__(self, batch: int):
        self.images = torch.randn(1, batch, 3, 224, 224)
        self.label = torch.zeros(batch, dtype=torch.long)

    def __iter__(self) -> Iterator[Batch]:
        position = 0
        while True:
            yield Batch(views={"mild": self.images}, label=self.label, position=position)
            position += len(self.label)


class Stopwatch(pl.Callback):
    """When each step was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        _wait()
        self.times.append(time.perf_counter())


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def module() -> Pretraining:
    """MAE ViT-S/16 as configs/pretrain/mae_vit_s16.yaml has it."""
    torch.manual_seed(0)
    backbone = VisionTransformer("vit_small_patch16_224", positions="sincos", init="mae")
    return Pretraining(
        backbone,
        {"reconstruct": functools.partial(MAE, mask="random")},
        masks={"random": functools.partial(RandomMasking, ratio=0.75)},
        optim=Optim(),
    )


def framework(data: Memory, steps: int) -> float:
    """Images/s of training under Lightning with the callbacks every run has."""
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_steps=READY + steps,
            accelerator="auto",
            devices=1,
            precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
            logger=JSONLLogger(Path(folder)),
            callbacks=[Throughput(), Progress(interval=1e9), FiniteLoss(), watch],
            enable_checkpointing=False,
            enable_model_summary=False,
            log_every_n_steps=20,
        )
        trainer.fit(module(), DataLoader(data, batch_size=None))
    return steps * len(data.label) / (watch.times[-1] - watch.times[READY - 1])


def bare(data: Memory, steps: int) -> float:
    """Images/s of the same modules in the shortest loop that trains them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = module().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    objective, masking = model.objectives["reconstruct"], model.masks["random"]
    start = 0.0
    for index, batch in zip(range(READY + steps), data, strict=False):
        if index == READY:
            _wait()
            start = time.perf_counter()
        image = batch["views"]["mild"].to(device)
        step = Step(index, index / (READY + steps))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            mask = masking.sample("random/mild", len(batch["label"]), 1, step, device)
            tokens = model.backbone(image.flatten(0, 1), mask)
            moved = Batch(views={"mild": image}, label=batch["label"], position=0)
            loss = objective({objective.passes[0]: tokens}, moved, step).value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _wait()
    return steps * len(data.label) / (time.perf_counter() - start)


def main() -> None:
    """Measure in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    data = Memory(given.batch)
    rows = []
    for k in range(given.rounds):
        # The order changes with every round, so that a drift of the machine hits both sides.
        sides = [bare, framework] if k % 2 else [framework, bare]
        found = {side.__name__: side(data, given.steps) for side in sides}
        rows.append((found["framework"], found["bare"]))
        print(f"round {k}: framework {rows[-1][0]:.2f} images/s, bare {rows[-1][1]:.2f}")
    ratios = [a / b for a, b in rows]
    print(
        f"median framework {statistics.median(a for a, _ in rows):.2f} images/s, "
        f"bare {statistics.median(b for _, b in rows):.2f}; ratio {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
