"""Dropout and drop path as functions of the place."""

import torch

from contramask.types import Step, fold


def seed_layers(step: Step, name: str, device: torch.device) -> None:
    """Seed dropout and drop path; the default generators alone, which costs microseconds."""
    seed = fold(step.seed, step.index, step.row, "layers", name)
    torch.random.default_generator.manual_seed(seed)  # pyright: ignore
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
