"""What the framework costs in fine-tuning: a step of `finetune`'s module, and of a bare timm loop.

    OMP_NUM_THREADS=1 uv run python benchmarks/finetune.py [--model NAME] [--batch 8] [--rounds 9]

Both sides train timm's ViT with mean pooling, drop path 0.1, layer-wise decay 0.65, mixup or cutmix
with label smoothing and random erasing, on the same images from memory, in turn, in one process.
The bare side is timm's own: model, parameter groups with `layer_decay`, `Mixup`, `RandomErasing`,
`SoftTargetCrossEntropy`. The figure is the median over rounds of the ratio of seconds a step
(framework / bare): on a GPU by the clock on the wall, on a CPU of processor time, which other load
on the machine disturbs less. Start-up and the first steps are not counted.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import timm
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay

from contramask.callbacks.finite import FiniteLoss
from contramask.callbacks.progress import Progress
from contramask.callbacks.throughput import Throughput
from contramask.data.augmentation import Augment
from contramask.data.augmenting import BatchAugment
from contramask.models.vit import VisionTransformer
from contramask.optim import Optim
from contramask.schedule import Schedule
from contramask.tracking.jsonl import JSONLLogger
from contramask.training.finetuning import UNDECAYED, FineTuning

READY = 2  # first steps, not counted
CLASSES = 1000
AUGMENT = Augment(randaugment=None)


def _now() -> float:
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Memory(pl.LightningDataModule):
    """One batch in memory, over and over, finished on its device as that of the shards is."""

    def __init__(self, batch: int):
        super().__init__()
        self.images = torch.randn(batch, 3, 224, 224)
        self.labels = torch.arange(batch) % CLASSES
        self.finish = BatchAugment(AUGMENT, CLASSES, seed=0)

    def train_dataloader(self) -> Iterator[dict[str, Any]]:
        position = 0
        while True:
            yield {"images": self.images, "label": self.labels, "position": position}
            position += len(self.labels)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> dict[str, Any]:
        images, target = self.finish(batch["images"].clone(), batch["label"], batch["position"])
        return {**batch, "views": {"train": images[None]}, "target": target}


class Stopwatch(pl.Callback):
    """When each step was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(_now())


def framework(data: Memory, model: str, steps: int) -> float:
    """Seconds a step under Lightning with the callbacks every run has."""
    watch = Stopwatch()
    torch.manual_seed(0)
    optim = Optim(
        lr=Schedule(peak=2e-3, end=1e-6, warmup=0.05), batch=1024, betas=(0.9, 0.999),
        rules=UNDECAYED, layer_decay=0.65,
    )  # fmt: skip
    module = FineTuning(VisionTransformer(model), CLASSES, size=224, drop_path=0.1, optim=optim)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_steps=READY + steps,
            accelerator="auto",
            devices=1,
            precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
            logger=JSONLLogger(Path(folder)),
            callbacks=[FiniteLoss(), Throughput(), Progress(interval=1e9), watch],
            enable_checkpointing=False,
            enable_model_summary=False,
            limit_val_batches=0,
            log_every_n_steps=20,
        )
        trainer.fit(module, datamodule=data)
    return (watch.times[-1] - watch.times[READY - 1]) / steps


def bare(data: Memory, model: str, steps: int) -> float:
    """Seconds a step of the shortest loop that does the same with timm."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    net = timm.create_model(
        model, num_classes=CLASSES, global_pool="avg", drop_path_rate=0.1
    ).to(device).train()  # fmt: skip
    groups = param_groups_layer_decay(net, weight_decay=0.05, layer_decay=0.65)
    for group in groups:
        group["lr"] = 1e-4 * group["lr_scale"]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    erase = RandomErasing(0.25, mode="pixel", max_count=1, device=str(device))
    criterion, start = SoftTargetCrossEntropy(), 0.0
    for index in range(READY + steps):
        if index == READY:
            start = _now()
        images, target = mixup(erase(data.images.to(device, copy=True)), data.labels.to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = criterion(net(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (_now() - start) / steps


def main() -> None:
    """Measure in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    data, rows = Memory(given.batch), []
    for k in range(given.rounds):
        # The order changes with every round, so that a drift of the machine hits both sides.
        sides = [bare, framework] if k % 2 else [framework, bare]
        found = {side.__name__: side(data, given.model, given.steps) for side in sides}
        rows.append((found["framework"], found["bare"]))
        print(f"round {k}: framework {rows[-1][0]:.4f} s a step, bare {rows[-1][1]:.4f}")
    ratios = [a / b for a, b in rows]
    print(
        f"median framework {statistics.median(a for a, _ in rows):.4f} s a step, "
        f"bare {statistics.median(b for _, b in rows):.4f}; ratio {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
