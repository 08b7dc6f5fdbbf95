"""Stands in for `contramask pretrain` in a batch job: the same options, a small run."""

import argparse
import logging
import os
import warnings
from pathlib import Path

import torch
import yaml

from contramask.callbacks.signals import inbox
from tests.callbacks.small_run import Plan, train


def main() -> None:
    """Train as the YAML says, in `runs/NAME`."""
    inbox.watch()
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["pretrain"])
    parser.add_argument("-c", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--resume", choices=["auto"], required=True)
    parser.add_argument("--trainer.devices", type=int, dest="devices", required=True)
    parser.add_argument("--trainer.num_nodes", type=int, dest="nodes", required=True)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    plan = yaml.safe_load(Path(given.c).read_text("utf-8"))
    ranks = given.devices * given.nodes
    logging.info("rank %s of %d", os.environ.get("SLURM_PROCID", "0"), ranks)
    train(Plan(str(Path("runs", given.name)), ranks=ranks, nodes=given.nodes, **plan))


if __name__ == "__main__":
    main()
