"""Images per second and core: contramask's views against torchvision's folder, Pillow and v2.

    uv run python benchmarks/loader.py

Both sides read the same original-resolution JPEGs from a folder, make the same views and end with
a normalised float batch on the CPU, in one process on one core with one thread. The two sides take
turns batch by batch, so a busy machine slows both; the ratio is the median over the turns. CPU
seconds, not wall seconds, are counted. Blur has two usual forms on the other side: v2's convolution
and MoCo's call of Pillow's filter; the faster one counts.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import platform
import random
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
import torchvision
from PIL import ImageFilter
from torch.utils.data import default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from contramask.data.photometric import Photometric
from contramask.data.views import IMAGENET_MEAN, IMAGENET_STD, Crops, Views

SIZE = 224


class PillowBlur:
    """The blur of MoCo's code: Pillow's filter with a random radius."""

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


class Several:
    """One image, several transforms: the usual two-crops wrapper."""

    def __init__(self, *transforms: Callable) -> None:
        self.transforms = transforms

    def __call__(self, image):
        return [t(image) for t in self.transforms]


def finish() -> list:
    """From Pillow's image to a normalised tensor."""
    return [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]


def moco_v2(blur: Callable, blur_probability: float, solarise: float) -> v2.Compose:
    """One of MoCo v3's two pipelines in torchvision's words."""
    steps = [
        v2.RandomResizedCrop(SIZE, scale=(0.08, 1.0)),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([blur], p=blur_probability),
    ]
    if solarise:
        steps.append(v2.RandomSolarize(128, p=solarise))
    return v2.Compose([*steps, v2.RandomHorizontalFlip(), *finish()])


def baselines() -> dict[str, dict[str, Callable]]:
    """The usual pipelines by task and variant."""
    convolution, filtered = v2.GaussianBlur(23, (0.1, 2.0)), PillowBlur()
    mae = v2.Compose(
        [
            v2.RandomResizedCrop(
                SIZE, scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC
            ),
            v2.RandomHorizontalFlip(),
            *finish(),
        ]
    )
    return {
        "MoCo v3, two views": {
            "v2 blur": Several(moco_v2(convolution, 1.0, 0.0), moco_v2(convolution, 0.1, 0.2)),
            "Pillow blur": Several(moco_v2(filtered, 1.0, 0.0), moco_v2(filtered, 0.1, 0.2)),
        },
        "MAE, one view": {"v2": mae},
    }


def ours() -> dict[str, Views]:
    """contramask's views by task."""
    first = Photometric(jitter=0.8, grey=0.2, blur=1.0)
    second = Photometric(jitter=0.8, grey=0.2, blur=0.1, solarise=0.2)
    pair = Crops(2, SIZE, interpolation="bilinear", photometric=(first, second))
    groups = {
        "MoCo v3, two views": {"global": pair},
        "MAE, one view": {"mild": Crops(1, SIZE, scale=(0.2, 1.0))},
    }
    return {
        task: Views(g, on_device=False, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        for task, g in groups.items()
    }


def unpack(source: Path, target: Path) -> None:
    """The JPEGs of all tars in `source` as target/class/KEY.jpg."""
    for tar in sorted(source.glob("*.tar")):
        with tarfile.open(tar) as members:
            for member in members:
                stream = members.extractfile(member)
                if member.name.endswith(".jpg") and stream is not None:
                    folder = target / "all"
                    folder.mkdir(exist_ok=True)
                    (folder / Path(member.name).name).write_bytes(stream.read())


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def run_ours(views: Views, paths: Sequence[str], indices: Iterable[int], turn: int) -> None:
    examples = [views(Path(paths[i]).read_bytes(), turn * 10_000 + i) for i in indices]
    views.finish(*views.collate(examples))


def run_theirs(data: ImageFolder, indices: Iterable[int]) -> None:
    default_collate([data[i] for i in indices])


def turn_by_turn(
    views: Views, datasets: dict[str, ImageFolder], turns: int, batch: int
) -> dict[str, list[float]]:
    """Images/s of every side in every turn; the first turn warms up and is left out."""
    paths = [path for path, _ in next(iter(datasets.values())).samples]
    order = random.Random(0).sample(range(len(paths)), len(paths))
    rates: dict[str, list[float]] = {name: [] for name in ["ours", *datasets]}
    for turn in range(turns + 1):
        start = turn * batch % len(order)
        indices = (order + order)[start : start + batch]
        took = {"ours": seconds(partial(run_ours, views, paths, indices, turn))}
        for name, data in datasets.items():
            took[name] = seconds(partial(run_theirs, data, indices))
        if turn > 0:
            for name, t in took.items():
                rates[name].append(batch / t)
    return rates


def compare(folder: Path, turns: int, batch: int) -> list[dict[str, object]]:
    """Images/s of every task, medians over turns."""
    results = []
    theirs = baselines()
    for task, views in ours().items():
        datasets = {name: ImageFolder(str(folder), t) for name, t in theirs[task].items()}
        rates = turn_by_turn(views, datasets, turns, batch)
        for name in datasets:
            ratios = [a / b for a, b in zip(rates["ours"], rates[name], strict=True)]
            results.append(
                {
                    "task": task,
                    "against": name,
                    "ours": statistics.median(rates["ours"]),
                    "theirs": statistics.median(rates[name]),
                    "ratio": statistics.median(ratios),
                }
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    here = Path(__file__).resolve().parents[1]
    root = Path(os.environ.get("CONTRAMASK_DATA", here.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=root / "imagenet-sample", help="tars of JPEGs")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    with tempfile.TemporaryDirectory() as folder:
        unpack(args.data, Path(folder))
        results = compare(Path(folder), args.turns, args.batch)
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {platform.machine()}")
    print(f"{'task':20s} {'against':12s} {'ours':>8s} {'theirs':>8s} {'ratio':>6s}   (images/s)")
    for r in results:
        print(
            f"{r['task']:20s} {r['against']:12s} {r['ours']:8.0f} {r['theirs']:8.0f} "
            f"{r['ratio']:6.2f}"
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
