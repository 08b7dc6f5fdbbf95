"""What the analyses cost: CKA against the usual loop, all of them against forward passes, memory.

    uv run python benchmarks/analysis.py cka
    uv run python benchmarks/analysis.py cost [--images 256] [--size 224]
    uv run python benchmarks/analysis.py memory
    uv run python benchmarks/analysis.py live

ViT-S/16 with random weights on smooth random images: no figure depends on what they show. CPU
seconds of one thread are counted, not wall seconds, and the two sides of a ratio take turns.

cka: from activations to the map of 108 x 108 layers on 1,024 images in minibatches of 32. The loop
is that of public tools (github.com/AntixK/PyTorch-Model-Compare): for each pair of layers a Gram
matrix and two unbiased HSIC, the other Gram matrix once a row. Blocks are alike, so one block of
each network is timed, 9 x 9 pairs, and stands for 12 x 12 of them and for 32 minibatches.
cost: `suite()` as it is; the limits that analyses set to images shrink with the images, from 1,024.
memory: the highest resident memory above that of the loaded networks, each in a process of its own.
live: a look of `AnalysisCallback` as it is, against 2,000 steps of MAE, the cheapest objective.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from contramask.analysis import record
from contramask.analysis.attention import AttentionStatistics
from contramask.analysis.cka import compare
from contramask.analysis.grams import SUBLAYERS, Grams, GramStack, grams
from contramask.analysis.run import analyse
from contramask.analysis.suite import suite
from contramask.callbacks.analysis import AnalysisCallback
from contramask.masks import RandomMasking
from contramask.models.vit import VisionTransformer
from contramask.objectives.mae import MAE
from contramask.optim import Optim
from contramask.probes.features import frozen
from contramask.training.pretraining import Pretraining
from contramask.types import Batch
from overhead import Memory
from overhead import module as mae_vit_s16

N = 32  # images of a minibatch of CKA
FULL = 1024  # images that the limits of analyses are meant for
now = time.process_time


def network(seed: int = 0, size: int = 224, depth: int = 12) -> VisionTransformer:
    """ViT-S/16."""
    torch.manual_seed(seed)
    timm = {"depth": depth}
    return VisionTransformer("vit_small_patch16_224", img_size=size, timm=timm).eval()


def smooth(count: int, size: int = 224, seed: int = 0) -> Tensor:
    """Normalised images of a few blots each."""
    coarse = torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return interpolate(coarse, size=(size, size), mode="bicubic")


def told(values: Sequence[float], form: str = ".2f") -> str:
    """Median and range."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):{form}} ({low:{form}} to {high:{form}})"


# ---- cka -----------------------------------------------------------------------------------------


def activations(net: VisionTransformer, images: Tensor, block: int = 6) -> list[Tensor]:
    """What the nine places of one block give."""
    found: list[Tensor] = []
    sites = [net.sites()[f"blocks.{block}.{name}"] for name in SUBLAYERS]
    hooks = [s.register_forward_hook(lambda m, args, out: found.append(out)) for s in sites]
    with torch.no_grad():
        net(images)
    for hook in hooks:
        hook.remove()
    return found


def hsic_of_two(k: Tensor, l: Tensor) -> Tensor:
    """Unbiased HSIC of Gram matrices with a zero diagonal."""
    n = len(k)
    mean = k.sum() * l.sum() / ((n - 1) * (n - 2))
    return ((k * l).sum() + mean - 2 / (n - 2) * (k.sum(0) @ l.sum(0))) / (n * (n - 3))


def zero_diagonal(x: Tensor) -> Tensor:
    rows = x.flatten(1)
    return (rows @ rows.T).fill_diagonal_(0.0)


def loop(a: list[Tensor], b: list[Tensor], gram: Callable[[Tensor], Tensor]) -> Tensor:
    """Sums of HSIC of all pairs of layers of one minibatch: (L, M, 3)."""
    sums = torch.zeros(len(a), len(b), 3, dtype=torch.float64)
    for i, x in enumerate(a):
        k = gram(x)
        sums[i, :, 0] += hsic_of_two(k, k)
        for j, y in enumerate(b):
            l = gram(y)
            sums[i, j, 1] += hsic_of_two(k, l)
            sums[i, j, 2] += hsic_of_two(l, l)
    return sums


def stack(parts: list[list[Tensor]], blocks: int) -> GramStack:
    """Gram matrices of minibatches, as if so many blocks had given them."""
    table = torch.stack([torch.cat([grams(x, N) for x in layers]) for layers in parts])
    labels = tuple(f"block_{i:02d}.{name}" for i in range(blocks) for name in SUBLAYERS)
    return GramStack("flat/raw", labels, table.repeat(1, blocks, 1, 1), tuple(range(len(table))))


def seconds(work: Callable[[], Any]) -> float:
    start = now()
    work()
    return now() - start


def cka(rounds: int) -> None:
    """The HSIC part of 108 x 108 layers; then that the two agree."""
    minibatches, blocks = FULL // N, 12
    nets = [network(seed) for seed in (1, 2)]
    parts = [smooth(N, seed=seed) for seed in range(2)]
    a, b = ([activations(net, part) for part in parts] for net in nets)
    whole = [stack(x, blocks) for x in (a, b)]
    ready = [[*x[0].table[0, :9].clone()] for x in ([s] for s in whole)]
    full = [
        s._replace(table=s.table.repeat(minibatches // 2, 1, 1, 1), keys=tuple(range(minibatches)))
        for s in whole
    ]
    ratios: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        slow = seconds(lambda: loop(a[0], b[0], zero_diagonal)) * blocks**2 * minibatches
        again = seconds(lambda: loop(ready[0], ready[1], torch.clone)) * blocks**2 * minibatches
        made = seconds(lambda: [grams(x, N) for x in a[0] + b[0]]) * blocks * minibatches
        mapped = seconds(lambda: compare(*full))
        ratios["the loop, s"].append(slow)
        ratios["the loop from Gram matrices that are ready, s"].append(again)
        ratios["ours: Gram matrices, s"].append(made)
        ratios["ours: map and summaries, s"].append(mapped)
        ratios["ratio from activations"].append(slow / (made + mapped))
        ratios["ratio from Gram matrices"].append(again / mapped)
    for name, values in ratios.items():
        print(f"{name:46s} {told(values)}")
    found = compare(*whole)[0]
    assert not found.missing.any()
    ours = found.value[:9, :9]
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        layers = [[[y.to(dtype) for y in part] for part in x] for x in (a, b)]
        sums = sum(loop(x, y, zero_diagonal) for x, y in zip(*layers, strict=True))
        theirs = sums[..., 1] / (sums[..., 0] * sums[..., 2]).sqrt()
        print(f"largest difference to the loop in {name}: {(ours - theirs).abs().max():.1e}")


# ---- cost ----------------------------------------------------------------------------------------


class Ledger:
    """CPU seconds of each analysis, noted by wrapping what it does."""

    def __init__(self, analyses: dict[str, Any]):
        self.spent: dict[str, float] = dict.fromkeys(analyses, 0.0)
        self.total = 0.0
        self._maps = 0.0  # seconds for the maps that the next `reduce` reads
        for name, analysis in analyses.items():
            analysis.taps = partial(self._taps, name, analysis.taps)
            for method in ("update", "readings"):
                setattr(analysis, method, partial(self._timed, name, getattr(analysis, method)))

    def _taps(self, name: str, taps: Callable, spec: Any) -> dict[str, Any]:
        return {
            key: tap._replace(reduce=partial(self._timed, name, tap.reduce))
            for key, tap in taps(spec).items()
        }

    def _timed(self, name: str, work: Callable, *args: Any) -> Any:
        start = now() - self._maps
        self._maps = 0.0
        found = work(*args)
        self.spent[name] += now() - start
        return found

    def attend(self, *args: Any) -> Any:
        """`attend`, on the account of the analysis that asked."""
        start = now()
        found = ATTEND(*args)
        self._maps = now() - start
        return found


ATTEND = record.attend


def run(net: VisionTransformer, parts: Iterator[Tensor], images: int) -> tuple[float, Ledger]:
    """Plain passes and all analyses over the same images in turn; seconds of the plain ones."""
    plain = 0.0

    def batches() -> Iterator[Batch]:
        nonlocal plain
        start = 0
        for part in parts:
            with frozen(net):
                plain += seconds(partial(net, part))
            label = torch.arange(len(part)) % 10
            yield Batch(views={"clean": part[None]}, label=label, position=start)
            start += len(part)

    analyses = suite()
    for analysis in analyses.values():
        if analysis.images is not None:
            analysis.images = max(1, analysis.images * images // FULL)
    ledger = Ledger(analyses)
    record.attend = ledger.attend
    ledger.total = seconds(lambda: analyse(net, batches(), analyses, chunk=64)) - plain
    record.attend = ATTEND
    return plain, ledger


def cost(images: int, size: int, rounds: int) -> None:
    """All analyses in units of plain forward passes, which take turns with them."""
    net, chunk = network(size=size), 64 if images >= 512 else N
    ratios, shares = [], defaultdict[str, list[float]](list)
    for turn in range(rounds):
        seeds = range(turn * images, (turn + 1) * images, chunk)
        plain, ledger = run(net, (smooth(chunk, size, seed) for seed in seeds), images)
        ratios.append(ledger.total / plain)
        for name, spent in ledger.spent.items():
            shares[name].append(spent / plain)
        rest = (ledger.total - sum(ledger.spent.values())) / plain - 1
        shares["forward passes of flips and crops, and the rest"].append(rest)
    print(f"{images} images of {size} pixels, {chunk} at once; a plain pass {plain:.1f} s")
    print(f"all analyses / plain passes: {told(ratios)}; of which 1 the plain pass and")
    for name, values in sorted(shares.items(), key=lambda entry: -statistics.median(entry[1])):
        print(f"    {name:50s} {told(values, '.3f')}")


# ---- memory --------------------------------------------------------------------------------------


def kilobytes(name: str) -> int:
    """VmRSS: resident now; VmHWM: at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise KeyError(name)


def growth(work: Callable[[], Any]) -> float:
    """MB of resident memory that some work takes at most."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest so far
    before = kilobytes("VmRSS")
    work()
    return (kilobytes("VmHWM") - before) / 1024


def peak_of_cka() -> float:
    """Two networks over 64 images; then the map from as many Gram matrices as 1,024 give."""
    nets, part = [network(seed) for seed in (1, 2)], smooth(2 * N)

    def work() -> None:
        stacks = []
        for net in nets:
            metric = Grams(batch=N, sublayers=SUBLAYERS)
            analyse(net, [part], {"cka": metric})
            found = metric.stack()
            table = found.table.repeat(FULL // len(part), 1, 1, 1)
            stacks.append(found._replace(table=table, keys=tuple(range(len(table)))))
        compare(*stacks, replicates=200)

    return growth(work)


def peak_of_attention(depth: int, plain: bool) -> float:
    """64 images through a network of this depth, with attention statistics or without."""
    net, part = network(depth=depth), smooth(64)
    metrics = {} if plain else {"attention": AttentionStatistics()}

    def work() -> None:
        with frozen(net):
            _ = net(part) if plain else analyse(net, [part], metrics)

    return growth(work)


def memory(rounds: int) -> None:
    """Each figure from processes of its own."""
    jobs: dict[str, Callable[[], float]] = {"CKA of 108 x 108 layers, n = 32": peak_of_cka}
    for depth in (6, 12):
        for plain in (True, False):
            what = "plain pass" if plain else "attention statistics"
            jobs[f"{what}, {depth} blocks"] = partial(peak_of_attention, depth, plain)
    found = defaultdict[str, list[float]](list)
    for _ in range(rounds):
        for name, job in jobs.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found[name].append(pool.submit(job).result())
    one = 64 * 6 * 197**2 * 4 / 2**20
    print(f"MB above the networks; the maps of one block for 64 images are {one:.0f} MB")
    for name, values in found.items():
        print(f"{name:40s} {told(values, '.0f')}")


# ---- live ----------------------------------------------------------------------------------------


class Data(pl.LightningDataModule):
    """One batch over and over, and clean images."""

    def __init__(self, batch: int, images: int, size: int):
        super().__init__()
        self.memory, self.images, self.size = Memory(batch), images, size
        self.memory.images = self.memory.images[..., :size, :size].contiguous()

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.memory, batch_size=None)

    def clean_dataloader(self, split: str, limit: int | None = None) -> Iterator[Batch]:
        for start in range(0, self.images, 64):
            part = smooth(64, self.size, seed=start)
            yield Batch(views={"clean": part[None]}, label=torch.arange(64) % 10, position=start)

    def to_device(self, batch: Batch, device: Any) -> Batch:
        return batch


class Clock(pl.Callback):
    """CPU seconds at the end of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(now())


def mae_cifar() -> Pretraining:
    """configs/pretrain/mae_cifar10.yaml."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 4, "timm": {"depth": 6}}
    net = VisionTransformer("vit_tiny_patch16_224", positions="sincos", init="mae", **sizes)
    return Pretraining(
        net,
        {"reconstruct": partial(MAE, mask="random", dim=128, depth=2, heads=4)},
        masks={"random": partial(RandomMasking, ratio=0.75)},
        optim=Optim(),
    )


def live(looks: int) -> None:
    """A look against 2,000 steps at batch 256, on the CPU."""
    for name, module, size, batch, images in (
        ("ViT-S/16 at 224", mae_vit_s16, 224, 8, 64),
        ("vit_tiny_cifar at 32", mae_cifar, 32, 256, 256),
    ):
        every, data = 4, Data(batch, images, size)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            before, after = Clock(), Clock()
            watch = AnalysisCallback(folder, every=every)
            trainer = pl.Trainer(
                max_steps=every * looks,
                accelerator="cpu",
                logger=False,
                callbacks=[before, watch, after],
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module(), datamodule=data)
        spent = [b - a for a, b in zip(before.times, after.times, strict=True)]
        took = [a - b for a, b in zip(before.times[1:], after.times[:-1], strict=True)]
        look = [256 / images * s for s in spent[every - 1 :: every]]
        step = [256 / batch * s for s in took]
        per_cent = [100 * s / (2000 * statistics.median(step)) for s in look]
        print(f"{name}: a look at 256 images {told(look)} s, from {images}")
        print(f"    a step of 256 images {told(step)} s, from {batch}")
        print(f"    a look / 2,000 steps: {told(per_cent, '.3f')} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("cka", "cost", "memory", "live"))
    parser.add_argument("--images", type=int, default=256, help="of cost")
    parser.add_argument("--size", type=int, default=224, help="of cost, pixels")
    parser.add_argument("--rounds", type=int, help="3; of cost 1")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if given.what == "cost":
        cost(given.images, given.size, given.rounds or 1)
    else:
        {"cka": cka, "memory": memory, "live": live}[given.what](given.rounds or 3)


if __name__ == "__main__":
    main()
