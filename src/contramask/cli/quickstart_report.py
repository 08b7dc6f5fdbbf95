"""What the quickstart found: a table of shape and texture, curves, and a picture of one batch."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from contramask.checkpoints.export import load_backbone
from contramask.data.module import Images, ImageShards
from contramask.data.procedural_scene import TEXTURES
from contramask.models.backbone import Backbone
from contramask.probes.evaluation import Split
from contramask.probes.extraction import extract
from contramask.probes.features import Feature
from contramask.probes.knn import KNN
from contramask.probes.linear import LinearProbe, LinearRecipe
from contramask.report.figures import bars, curves
from contramask.tracking.jsonl import read_metrics

COLUMNS = ("shape k-NN", "texture k-NN", "shape linear", "texture linear")
BANK, VAL = 4096, 2048
Row = dict[str, object]


def probe_all(
    out: Path, runs: Mapping[str, str], patterns: Mapping[str, str], *, seed: int
) -> list[Row]:
    """Accuracies (%) of shape and texture on frozen features, for each run and for none."""
    images = Images(size=32, resize=32)
    data = ImageShards(patterns["train"], val=patterns["val"], workers=0, images=images)
    untrained, _ = load_backbone(out / next(iter(runs)))
    torch.manual_seed(seed)
    fresh = type(untrained)(**untrained.config).eval()
    rows = [{"encoder": "random init", **probe(fresh, data, seed=seed)}]
    for name, title in runs.items():
        backbone, _ = load_backbone(out / name)
        rows.append({"encoder": title, **probe(backbone, data, seed=seed)})
    return rows


def probe(backbone: Backbone, data: ImageShards, *, seed: int) -> dict[str, float]:
    """k-NN (k = 20) and linear accuracy for both factors, on the mean of the patch tokens."""
    found = []
    parts: tuple[tuple[Split, int], ...] = (("train", BANK), ("val", VAL))
    for split, limit in parts:
        batches = (data.to_device(b, "cpu") for b in data.clean_dataloader(split, limit))
        found.append(extract(backbone, batches, feature=Feature(pool="mean")))
    (x, y), (x_val, y_val) = found
    values = {}
    for name, one, other in (
        ("shape", y // len(TEXTURES), y_val // len(TEXTURES)),
        ("texture", y % len(TEXTURES), y_val % len(TEXTURES)),
    ):
        classes = int(one.max()) + 1
        neighbours = KNN(classes, ks=(20,))
        neighbours.fit(x, one)
        linear = LinearProbe(x.shape[1], classes, recipe=LinearRecipe(epochs=30, seed=seed))
        linear.fit(x, one)
        for kind, probe in (("k-NN", neighbours), ("linear", linear)):
            right = probe.predict(x_val).argmax(1) == other
            values[f"{name} {kind}"] = 100 * float(right.float().mean())
    return {column: values[column] for column in COLUMNS}


def show(rows: Sequence[Row], console: Console) -> None:
    """The table, and a sentence read off from it."""
    table = Table(title="accuracy on frozen features, %  (chance 12.5)", title_justify="left")
    table.add_column("encoder")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(str(row["encoder"]), *(f"{row[column]:.1f}" for column in COLUMNS))
    console.print(table)
    for row in rows[1:]:
        gains = {
            factor: sum(float(str(row[c])) - float(str(rows[0][c])) for c in COLUMNS if factor in c)
            for factor in ("shape", "texture")
        }
        more, less = sorted(gains, key=gains.__getitem__, reverse=True)
        kind = f"{more}-oriented" if gains[more] > 0 else "nothing learned: too short a training"
        console.print(
            f"{row['encoder']}: {gains[more] / 2:+.1f} points of {more} over random init, "
            f"{gains[less] / 2:+.1f} of {less}: [bold]{kind}[/bold]",
            highlight=False,
            soft_wrap=True,
        )


def write(out: Path, runs: Mapping[str, str], rows: Sequence[Row]) -> list[Path]:
    """Curves and bars of all runs; returns what was written."""
    metrics = {runs[name]: read_metrics(out / name / "metrics.jsonl") for name in runs}
    keys = ["train/loss", "train/loss/contrast", "train/loss/reconstruct", "optim/grad_norm"]
    table = {str(r["encoder"]): {c: float(str(r[c])) for c in COLUMNS} for r in rows}
    text = ",".join(["encoder", *COLUMNS]) + "\n"
    text += "".join(f"{r['encoder']}," + ",".join(f"{r[c]}" for c in COLUMNS) + "\n" for r in rows)
    results = out / "results.csv"
    results.write_text(text, "utf-8")
    return [
        curves(metrics, keys, out / "curves.png"),
        bars(table, out / "shape_and_texture.png", chance=12.5, muted=["random init"]),
        results,
    ]
