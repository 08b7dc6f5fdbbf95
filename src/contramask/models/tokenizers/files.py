"""Tokenizers on disk: safetensors, or a state dict that torch reads without running code."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from contramask.models.tokenizers.dalle import DalleTokenizer
from contramask.models.tokenizers.patches import PatchTokenizer
from contramask.models.tokenizers.tokenizer import Tokenizer
from contramask.types import UserError

CONVERT = (
    "python -c \"import torch; torch.save(torch.load('encoder.pkl', weights_only=False, "
    "map_location='cpu').state_dict(), 'encoder.pt')\""
)


def save_tokenizer(tokenizer: PatchTokenizer, path: Path, **facts: object) -> None:
    """Write a codebook; `facts` of its making go into the file's header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # One entry: safetensors writes several in any order, and equal fits shall be equal files.
    header = {"contramask tokenizer": json.dumps(facts)}
    save_file({"codebook": tokenizer.codebook.contiguous()}, path, header)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file: a codebook of `contramask tokenizer fit`, or DALL-E's encoder.

    Raises:
        UserError: if there is no such file, or it holds something else; a pickled module, as
            DALL-E's encoder was published, is refused: reading it runs code.
    """
    if not path.is_file():
        raise UserError(
            f"no tokenizer at {path}; make one with contramask tokenizer fit --data.train SHARDS "
            f"--out {path}, or give another file where the objective is configured"
        )
    state = _read(path)
    if set(state) == {"codebook"}:
        return PatchTokenizer(state["codebook"].float())
    return DalleTokenizer.from_state(state)


def fingerprint(tokenizer: Tokenizer) -> int:
    """63 bits that tell tokenizers apart, from all their numbers."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                return {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118  no mapping
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is no safetensors file ({error}); fit it again") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{path} is no state dict: reading it would run code in it, as the pickled module does "
            "that DALL-E's encoder was published as. Where you trust it and have its package, "
            f"write its state dict and give that: {CONVERT}"
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} holds no state dict, names and tensors; give the encoder's")
    return state
