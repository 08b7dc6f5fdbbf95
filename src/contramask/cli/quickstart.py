"""`contramask quickstart`: the whole story on an embedded data set, in minutes on two CPU cores."""

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

# What is trained: name, recipe, and how the table calls it. Heavy imports wait for the work.
RUNS = {"mocov3": "MoCo v3 (contrastive)", "mae": "MAE (masked)", "hybrid": "hybrid of both"}

NEXT = """\
What to try next
  the pictures      {out}/*.png, {out}/hybrid/pictures/
  every number      {out}/*/metrics.csv; the same in W&B: wandb login, then --wandb.mode online
  another weight    contramask pretrain -c configs/quickstart/hybrid.yaml --data.train '{train}' \\
                      --data.val '{val}' --model.weights.contrast 0.8
  your own images   contramask pack imagefolder FOLDER shards/train
  all recipes       contramask pretrain --list"""


def main(argv: Sequence[str]) -> None:
    """Make shards, pretrain three ways, probe for shape and texture, show what came out."""
    parser = argparse.ArgumentParser(prog="contramask quickstart", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="where it goes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of each training; default as in its YAML")
    parser.add_argument("--images", type=int, default=8192, help="training images, 64 at a time")
    given = parser.parse_args(list(argv))
    quickstart(given.out, seed=given.seed, steps=given.steps, images=given.images)


def quickstart(out: Path, *, seed: int, steps: int | None, images: int) -> list[dict[str, object]]:
    """Run everything; returns the rows of the table. What is already there is not done again."""
    import torch

    from contramask.cli import quickstart_report as report
    from contramask.cli.pretrain import build_parser, pretrain
    from contramask.cli.quiet import settle
    from contramask.cli.recipes import folder
    from contramask.data.procedural import write_shards

    # Matrices this small gain nothing from a second thread and lose much when another program
    # wants that core; and sums in one order give the same numbers on any number of cores.
    torch.set_num_threads(1)
    settle()
    logging.getLogger("contramask").setLevel(logging.WARNING)  # the progress bar is enough
    console, start = Console(), time.monotonic()
    console.rule("1  images: shape, texture and background are independent")
    patterns = write_shards(out / "data", images=images, val_images=2048, seed=seed)
    console.print(f"{images} training and 2048 validation images in {out / 'data'}")
    for number, (name, title) in enumerate(RUNS.items(), start=2):
        console.rule(f"{number}  pretrain: {title}")
        parser = build_parser()
        arguments = [
            *("-c", str(folder() / "quickstart" / f"{name}.yaml")),
            *("--root", str(out), "--name", name, "--seed", str(seed)),
            *("--data.train", patterns["train"], "--data.val", patterns["val"]),
            *(_shortened(steps) if steps else ()),
        ]
        pretrain(parser, parser.parse_args(arguments))
    console.rule(f"{len(RUNS) + 2}  what can be read from frozen features")
    rows = report.probe_all(out, RUNS, patterns, seed=seed)
    report.show(rows, console)
    for path in report.write(out, RUNS, rows):
        console.print(f"wrote {path}", highlight=False)
    console.print(f"all done in {time.monotonic() - start:.0f} s\n")
    console.print(NEXT.format(out=out, **patterns), highlight=False, soft_wrap=True)
    return rows


def _shortened(steps: int) -> tuple[str, ...]:
    """The options of a training of so many steps, with curves of some points all the same."""
    every = max(1, min(10, steps // 4))
    return ("--trainer.max_steps", str(steps), "--trainer.log_every_n_steps", str(every))
