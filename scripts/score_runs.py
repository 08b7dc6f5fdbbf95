"""k-NN and linear accuracy of runs, of random backbones and of raw pixels, over seeds: one table.

    python scripts/score_runs.py --data cifar10 --size 32 --baselines runs/*_s[012]

Runs are named OBJECTIVE_sSEED; those of one objective give a mean and the largest distance of a
seed from it. Features are the class token and the mean of the patches; 20 nearest neighbours by the
cosine, of features as they are and of channels of mean 0 and deviation 1; linear probe of 50
epochs with its rate chosen on a tenth of train. A random backbone is one of the first run's kind,
with the seed of each run.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contramask.checkpoints.export import load_backbone
from contramask.data.examples import Images
from contramask.data.module import ImageShards
from contramask.probes.extraction import extract
from contramask.probes.features import Feature
from contramask.probes.knn import KNN
from contramask.probes.linear import LinearProbe, LinearRecipe

SOURCES = ("mean", "cls")
Bank = tuple[Tensor, Tensor, Tensor, Tensor]  # train features and labels, val features and labels


def scores(bank: Bank, classes: int, seed: int) -> list[float]:
    """k-NN, k-NN of standardised channels, and linear accuracy, %."""
    x, y, queries, labels = bank
    mean, std = x.mean(0), x.std(0) + 1e-6
    found = []
    for inside, asked in ((x, queries), ((x - mean) / std, (queries - mean) / std)):
        knn = KNN(classes, ks=(20,))
        knn.fit(inside, y)
        found.append(knn.predict(asked))
    linear = LinearProbe(x.shape[1], classes, recipe=LinearRecipe(epochs=50, seed=seed))
    linear.fit(x, y)
    found.append(linear.predict(queries))
    return [100 * (votes.argmax(1) == labels).float().mean().item() for votes in found]


def show(rows: dict[str, list[list[float]]]) -> None:
    """A markdown table: mean over seeds and largest distance from it."""
    kinds = "k-NN | standardised | linear"
    print(f"| %, mean ± distance | mean of patches: {kinds} | class token: {kinds} |")
    print("|---|---|---|---|---|---|---|")
    for name, seeds in rows.items():
        table = torch.tensor(seeds)
        mean, spread = table.mean(0), (table - table.mean(0)).abs().amax(0)
        cells = [f"{m:.1f} ± {s:.1f}" for m, s in zip(mean.tolist(), spread.tolist(), strict=True)]
        print(f"| {name} ({len(seeds)}) | {' | '.join(cells)} |", flush=True)


def shards(folder: Path, images: dict[str, Any]) -> ImageShards:
    """The clean images of a folder."""
    train, val = (f"{folder}/{split}-*.tar" for split in ("train", "val"))
    return ImageShards(train, val=val, images=Images(**images), batch_size=256, workers=0)


def bank(data: ImageShards, read: Callable[[Any], tuple[Tensor, Tensor]]) -> Bank:
    """Features and labels of both splits."""
    parts = []
    for split in ("train", "val"):
        loader = data.clean_dataloader(split)
        parts += read(data.to_device(batch, "cpu") for batch in loader)
    return tuple(parts)


def pixels(batches: Any) -> tuple[Tensor, Tensor]:
    """Images as they are."""
    found = [(b["views"]["clean"][0].flatten(1), b["label"]) for b in batches]
    return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])


def main() -> None:
    """Read the arguments, score, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, required=True, help="has train-*.tar and val-*.tar")
    parser.add_argument("--baselines", action="store_true", help="raw pixels and random init too")
    parser.add_argument("--size", type=int, default=32)
    given = parser.parse_args()
    plain = shards(given.data, {"size": given.size, "resize": given.size})
    raw = bank(plain, pixels)  # (N, 3 S S)
    classes = int(raw[1].max()) + 1
    seeds = sorted({int(run.name.rsplit("_s", 1)[1]) for run in given.runs})
    table: dict[str, list[list[float]]] = defaultdict(list)

    def of(backbone: Any, sheet: dict[str, Any], seed: int) -> list[float]:
        """All scores; images are normalised as the sheet of the run says."""
        data, found = shards(given.data, sheet["data"]), []
        for source in SOURCES:
            found += scores(
                bank(data, lambda b, s=source: extract(backbone, b, feature=Feature(pool=s))),
                classes,
                seed,
            )
        return found

    if given.baselines:
        backbone, sheet = load_backbone(given.runs[0])
        for seed in seeds:
            table["raw pixels"].append(scores(raw, classes, seed) * 2)
            torch.manual_seed(seed)
            table["random init"].append(of(type(backbone)(**backbone.config), sheet, seed))
        show(table)
    for run in given.runs:
        name, seed = run.name.rsplit("_s", 1)
        backbone, sheet = load_backbone(run)
        table[name].append(of(backbone, sheet, int(seed)))
        print(run.name, [round(x, 2) for x in table[name][-1]], flush=True)
    show(table)


if __name__ == "__main__":
    main()
