"""What a whole grid of linear probes costs against a single one on the same images.

    uv run python benchmarks/linear_grid.py [--rows 5000] [--epochs 10] [--classes 100] [--rounds 3]

Grid: 13 learning rates x 2 pools x 4 depths of ViT-S/16, 104 heads; the rates are chosen and the 8
chosen heads trained again. Single: one rate on the class token, no choice. CPU seconds of one
thread; the two sides take turns.

extraction: `stored_features` with random weights at 224, per image, from runs of two lengths, so
that start-up is not counted. training: `LinearGrid.fit` on random rows of 384 numbers. whole:
extraction of so many rows and training, added up; for 100 epochs training counts tenfold.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytorch_lightning as pl
import torch

from contramask.data.examples import Images
from contramask.data.module import ImageShards
from contramask.data.procedural import write_shards
from contramask.models.vit import VisionTransformer
from contramask.probes.features import CLS, Feature
from contramask.probes.grid import LinearGrid
from contramask.probes.grid_cells import Axes
from contramask.probes.linear import LinearProbe, LinearRecipe
from contramask.probes.store import Bank
from contramask.training.stored import stored_features

RATES = (*(a * 10.0**b for b in (-5, -4, -3, -2) for a in (1, 2, 5)), 0.1)  # DINOv2's
DEPTHS = ("block_08", "block_09", "block_10", "last")
GRID = tuple(Feature(s, p) for s, p in product(DEPTHS, ("cls", "mean")))
SHORT, LONG = 4, 16  # images of each split
now = time.process_time


def seconds(call: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    begin = now()
    call()
    return now() - begin


def extraction(folder: Path, rounds: int) -> dict[str, list[float]]:
    """CPU seconds an image, of one feature and of those of the grid."""
    shards = write_shards(folder, images=64, val_images=64, size=224, shards=1)
    torch.manual_seed(0)
    backbone = VisionTransformer("vit_small_patch16_224").requires_grad_(requires_grad=False)

    def run(wanted: tuple[Feature, ...], limit: int) -> None:
        data = ImageShards(
            shards["train"], val=shards["val"], batch_size=4, workers=0, images=Images()
        )
        trainer = pl.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
            enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as place:
            stored_features(
                backbone, data, trainer, wanted, folder=Path(place), limit=limit, transform=""
            )

    run(GRID, SHORT)  # what is made once
    found: dict[str, list[float]] = {"single": [], "grid": []}
    for _ in range(rounds):
        for name, wanted in (("single", (CLS,)), ("grid", GRID)):
            short, long = (seconds(lambda n=n, w=wanted: run(w, n)) for n in (SHORT, LONG))
            found[name].append((long - short) / (2 * (LONG - SHORT)))
    return found


def training(rows: int, classes: int, epochs: int, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of training on rows that are there."""
    y = torch.arange(rows) % classes
    centres = torch.randn(classes, 384)
    x = {f: centres[y] + 4 * torch.randn(rows, 384) for f in GRID}
    bank = Bank(x, y, [""] * rows)
    recipe = LinearRecipe(rates=RATES, epochs=epochs)
    alone = replace(recipe, rates=(0.1,))
    probe = LinearProbe(384, classes, recipe=recipe)
    sides: dict[str, Callable[[], object]] = {
        "single": lambda: LinearGrid(Axes((CLS,), recipe=alone), classes).fit(bank),
        "probe": lambda: LinearProbe(384, classes, recipe=alone).fit(x[CLS], y),
        "sweep": lambda: probe.fit(x[CLS], y),
        "grid": lambda: LinearGrid(Axes(GRID, recipe=recipe), classes).fit(bank),
    }
    # The grid takes seconds, in which noise is averaged; the others are over at once.
    turns = {"grid": 1, "single": 5 * rounds, "probe": 5 * rounds, "sweep": rounds}
    return {n: [seconds(side) for _ in range(turns[n])] for n, side in sides.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "contramask"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        read = {k: statistics.median(v) for k, v in extraction(Path(folder), a.rounds).items()}
    train = {
        k: statistics.median(v) for k, v in training(a.rows, a.classes, a.epochs, a.rounds).items()
    }
    wide = read["grid"] / read["single"]
    print(f"extraction: {1000 * read['single']:.0f} ms an image, of 8 features {wide:.3f} x that")
    many, sweeps = train["grid"] / train["single"], 8 * train["sweep"] / train["grid"]
    print(f"training: {train['single']:.2f} s for one head, by LinearProbe {train['probe']:.2f}")
    print(f"training: {train['grid']:.2f} s for 104 heads and the 8 chosen, {many:.1f} x that")
    print(f"training: 8 sweeps of LinearProbe one after the other take {sweeps:.2f} x the grid")
    for epochs in (a.epochs, 10 * a.epochs):
        part = epochs / a.epochs
        whole = {k: a.rows * read[k] + part * train[k] for k in ("single", "grid")}
        print(f"whole, {epochs} epochs: ratio {whole['grid'] / whole['single']:.3f}")


if __name__ == "__main__":
    main()
