"""A checksum of weights, for whatever is kept of a model and must not be taken for another's."""

import hashlib
from typing import Any

import torch
from torch import nn


def digest_of(weights: nn.Module, *settings: Any) -> str:
    """SHA-256 of weights and buffers, and of whatever else a result hangs on, in hexadecimal."""
    found = hashlib.sha256(repr(settings).encode())
    for name, value in sorted(weights.state_dict().items()):
        found.update(name.encode())
        flat = value.detach().cpu().contiguous().reshape(-1)  # bytes of a scalar are refused
        found.update(flat.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
