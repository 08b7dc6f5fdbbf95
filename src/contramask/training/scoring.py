"""How often classifiers are right, over clean images of which every rank reads its part."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics import MeanMetric

from contramask.distributed import total
from contramask.probes.features import CLEAN, frozen
from contramask.probes.probe import accuracy
from contramask.types import Batch


@torch.no_grad()
def score(
    nets: Mapping[str, nn.Module], batches: Iterable[Batch], classes: int, device: torch.device
) -> dict[str, float]:
    """Accuracy and cross-entropy of each network.

    All ranks call it, each with its own part of the images; parts may be of any length. Images
    without a label do not count.

    Args:
        nets: prefix of the names of its numbers -> images to a score per class.
        batches: with the view `clean`, on the device.
        classes: how many.
        device: of the networks.

    Returns:
        `{prefix}top1`, `{prefix}top5` (of more than five classes), `{prefix}loss`, as fractions and
        nats, and `images`, counted over all ranks.
    """
    found: dict[str, Any] = {p: accuracy(classes).to(device) for p in nets}
    losses = {p: MeanMetric().to(device) for p in nets}
    images = torch.zeros((), dtype=torch.long, device=device)
    for batch in batches:
        labels, known = batch["label"], batch["label"] >= 0
        if not known.any():
            continue
        images += known.sum()
        for prefix, net in nets.items():
            with frozen(net):
                logits = net(batch["views"][CLEAN][0]).float()[known]
            found[prefix].update(logits, labels[known])
            losses[prefix].update(F.cross_entropy(logits, labels[known], reduction="none"))
    values: dict[str, float] = {}
    with warnings.catch_warnings():
        # A rank without an image has nothing to add; torchmetrics takes it for a slip.
        warnings.filterwarnings("ignore", "The ``compute`` method of metric")
        for prefix in nets:
            numbers = {**found[prefix].compute(), "loss": losses[prefix].compute()}
            values |= {f"{prefix}{k}": round(float(v), 6) for k, v in numbers.items()}
    return {**values, "images": int(total(images))}
