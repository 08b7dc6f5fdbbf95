"""Reduced copies of the authors' tensors, for tests/parity: what the tests read, and no more.

    python scripts/reduce_parity.py FOLDER_OF_FULL_FILES

Weights and inputs are kept whole, in float32. Of large results (gradients, weights after training,
tables) every n-th entry is kept, with the norm and the largest entry of the whole tensor; n shares
no factor with any side of the tensor, so every row and column is met. What follows from something
else in the file (targets from images, the trunk of a fine-tuned model from its origin) is left out.
The files are `torch.save` of nested dicts; the four bytes of all numbers are put in four planes,
because exponents beside exponents compress, and packed by xz; tests/conftest.py undoes it.
"""

import io
import lzma
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MOST = 256  # entries of a thinned tensor
OUT = Path(__file__).resolve().parents[1] / "tests" / "parity"


def thin(tensor: Tensor) -> dict[str, Any]:
    """Every n-th entry, the norm and the largest absolute value."""
    if tensor.is_floating_point():
        tensor = tensor.float()
    stride = max(1, math.ceil(tensor.numel() / MOST))
    while math.gcd(stride, tensor.numel()) > 1:
        stride += 1
    return {
        "shape": tuple(tensor.shape),
        "stride": stride,
        "values": tensor.flatten()[::stride].clone(),
        "norm": tensor.double().norm().item(),
        "max": tensor.double().abs().max().item(),
    }


def thin_all(tensors: dict[str, Tensor | None]) -> dict[str, Any]:
    """`thin` of each; what is None (no gradient) stays None."""
    return {name: None if t is None else thin(t) for name, t in tensors.items()}


def mae(full: dict[str, Any]) -> dict[str, Any]:
    """Without the random order, which the noise gives, and the fine-tuned trunks."""
    case, state = full["norm_pix"], full["state_dict"]
    finetune = {
        kind: tuned
        | {
            "state_dict": {
                name: value
                for name, value in tuned["state_dict"].items()
                if name not in state or not torch.equal(value, state[name])
            }
        }
        for kind, tuned in full["finetune"].items()
    }
    return full | {
        "finetune": finetune,
        "norm_pix": {k: v for k, v in case.items() if k != "ids_restore"}
        | {
            "grads": thin_all(case["grads"]),
            "target": thin(case["target"]),
            "pred": thin(case["pred"]),
        },
        "sincos_224_768": thin(full["sincos_224_768"]),
        "sincos_tiny": thin(full["sincos_tiny"]),
    }


def mocov3(full: dict[str, Any]) -> dict[str, Any]:
    """Every tensor of the start, a part of each after the step."""
    return full | {
        "grads": thin_all(full["grads"]),
        "state_after": thin_all(full["state_after"]),
        "sincos_224_768": thin(full["sincos_224_768"]),
    }


def dino(full: dict[str, Any]) -> dict[str, Any]:
    """All six steps; gradients of the first alone."""
    case = full["norm_last_true"]
    steps = [{k: v for k, v in s.items() if k != "grads_before_clip"} for s in case["steps"]]
    steps[0]["grads_before_clip"] = thin_all(case["steps"][0]["grads_before_clip"])
    ends = {name: thin_all(case[name]) for name in ("student_final", "teacher_final")}
    return full | {"norm_last_true": case | ends | {"steps": steps}}


def compact(value: Any) -> Any:
    """Views as tensors of their own: a saved view brings its whole storage along."""
    if isinstance(value, dict):
        return {k: compact(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(compact(v) for v in value)
    return value.clone() if isinstance(value, Tensor) else value


def main(folder: Path) -> None:
    """Write `tests/parity/NAME.pt.xz` of each method and tell the sizes."""
    for reduce in (mae, mocov3, dino):
        name = reduce.__name__
        full = torch.load(folder / f"{name}.pt", weights_only=True)
        file = io.BytesIO()
        torch.save(compact(reduce(full)), file)
        plain = file.getvalue() + bytes(-len(file.getvalue()) % 4)
        planes = np.frombuffer(plain, np.uint8).reshape(-1, 4).T
        data = lzma.compress(planes.tobytes(), preset=9 | lzma.PRESET_EXTREME)
        (OUT / f"{name}.pt.xz").write_bytes(data)
        print(f"{name}: {len(plain) / 1e6:.2f} MB, compressed {len(data) / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
