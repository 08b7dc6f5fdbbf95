"""What a user sees on the terminal: our lines, and of libraries those that concern them."""

import logging
import os
import warnings

# (message, why it does not concern the user)
BESIDE_THE_POINT = (
    (r"Found \d+ module\(s\) in eval mode", "teachers are in eval mode on purpose"),
    (r"You passed in a `val_dataloader`", "probes read it; nothing is validated by the trainer"),
    (r".*isinstance\(treespec, LeafSpec\)", "between Lightning and torch"),
    (r".*does not have many workers", "data.workers is the user's choice"),
    (r".*does not have a __len__|Your `IterableDataset` has `__len__`", "streams have no end"),
    (r"Starting from v1.9.0, `tensorboardX`", "metrics go to JSONL and W&B"),
    (r".*srun` command is available", "a login node or a plain allocation is no mistake"),
)


def settle() -> None:
    """Show contramask's own log; of libraries only what is wrong. Rank 0 speaks alone."""
    for message, _ in BESIDE_THE_POINT:
        warnings.filterwarnings("ignore", message=message)
    for library in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    own = logging.getLogger("contramask")
    first = os.environ.get("LOCAL_RANK", "0") == os.environ.get("SLURM_PROCID", "0") == "0"
    own.setLevel(logging.INFO if first else logging.WARNING)
    if not own.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
        own.addHandler(handler)
        own.propagate = False
