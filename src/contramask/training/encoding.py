"""The forwards of a step: each once, with one mask for equal (mask, view) pairs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from contramask.masks import Masking
from contramask.training.dropout import seed_layers
from contramask.types import Batch, Mask, Pass, Step, Tokens


def encode(
    plan: Mapping[Pass, Sequence[Pass]],
    masks: nn.ModuleDict,
    network: Callable[[str], Callable[..., Tokens]],
    batch: Batch,
    step: Step,
) -> dict[Pass, Tokens]:
    """What every pass yields.

    Args:
        plan: the forwards, and the passes each of them serves.
        masks: ways of hiding patches by name.
        network: the student or the teacher, by these names.
        batch: on the device.
        step: its place.
    """
    drawn: dict[tuple[str, str], Mask] = {}
    feats: dict[Pass, Tokens] = {}
    for reads, served in plan.items():
        view = batch["views"][reads.view]  # (V, B, 3, H, W)
        mask, fill = None, None
        if reads.mask is not None:
            masking = masks[reads.mask]
            assert isinstance(masking, Masking)
            fill, key = masking.fill, (reads.mask, reads.view)
            if key not in drawn:
                crops, images = view.shape[:2]
                drawn[key] = masking.sample("/".join(key), images, crops, step, view.device)
            mask = drawn[key]
        # By name, not by order: another objective must not move this one's drop path.
        seed_layers(step, str(replace(reads, layers=())), view.device)
        tokens = network(reads.net)(view.flatten(0, 1), mask, fill, reads.layers)
        feats |= dict.fromkeys(served, tokens)
    return feats
