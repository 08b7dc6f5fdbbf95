"""Reduced copies of the authors' tensors, for tests/parity: what the tests read, and no more.

    python scripts/reduce_parity.py FOLDER_OF_FULL_FILES

Weights and inputs are kept whole, in float32. Of large results (gradients, weights after training,
tables) every n-th entry is kept, with the norm and the largest entry of the whole tensor; n shares
no factor with any side of the tensor, so every row and column is met. What follows from something
else in the file (targets from images, the trunk of a fine-tuned model from its origin) is left out.
What the authors' run drew from a known seed (images, the noise by which one network differs from
another) is drawn again: of it only the difference of the bits is kept, which is zeros where
`torch.randn` gives what it gave. The files are `torch.save` of nested dicts; the four bytes of all
numbers are put in four planes, because exponents beside exponents compress, and packed by xz;
`load_reduced` undoes it.
"""

import io
import lzma
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass
class Drawn:
    """Tensors that are `base` + the sum of sigma * randn(seed), drawn one after the other."""

    paths: list[tuple[str | int, ...]]  # in the order of drawing
    noise: list[tuple[int, float]]  # seed, sigma
    base: float | list[tuple[str | int, ...]] = 0.0

    def guesses(self, tree: Any) -> Iterator[tuple[Any, str | int, Tensor]]:
        """Each tensor's holder, its key there, and what `torch.randn` says it is."""
        sources = [(torch.Generator().manual_seed(seed), sigma) for seed, sigma in self.noise]
        for i, path in enumerate(self.paths):
            holder = follow(tree, path[:-1])
            shape = holder[path[-1]].shape
            start = follow(tree, self.base[i]) if isinstance(self.base, list) else self.base
            guess = sum((sigma * torch.randn(shape, generator=g) for g, sigma in sources), start)
            yield holder, path[-1], guess

    def pack(self, tree: Any) -> dict[str, Any]:
        """Put the differences of bits in place of the tensors; what `unpack` needs beside them."""
        norm = 0.0
        for holder, key, guess in self.guesses(tree):
            norm += holder[key].double().norm().item() ** 2
            holder[key] = holder[key].contiguous().view(torch.int32) - guess.view(torch.int32)
        return {"paths": self.paths, "noise": self.noise, "base": self.base, "norm": norm**0.5}


def unpack(tree: Any, packed: dict[str, Any]) -> None:
    """The tensors in place of the differences.

    Raises ValueError where `torch.randn` draws other numbers than it did for the authors' run.
    """
    norm = 0.0
    drawn = Drawn(packed["paths"], packed["noise"], packed["base"])
    for holder, key, guess in drawn.guesses(tree):
        holder[key] = (holder[key] + guess.view(torch.int32)).view(torch.float32)
        norm += holder[key].double().norm().item() ** 2
    if not math.isclose(norm**0.5, packed["norm"], rel_tol=1e-6):
        raise ValueError(
            f"torch {torch.__version__} draws other numbers from the seeds {packed['noise']} than "
            "the run that made these tensors: set CONTRAMASK_PARITY to the folder of the full files"
        )


def follow(tree: Any, path: tuple[str | int, ...]) -> Any:
    """tree[path[0]][path[1]]..."""
    for key in path:
        tree = tree[key]
    return tree


def load_reduced(file: Path) -> dict[str, Any]:
    """What `main` wrote."""
    planes = np.frombuffer(lzma.decompress(file.read_bytes()), np.uint8)
    tree = torch.load(io.BytesIO(planes.reshape(4, -1).T.tobytes()), weights_only=True)
    for packed in tree.pop("drawn"):
        unpack(tree, packed)
    return tree


def mae(full: dict[str, Any]) -> tuple[dict[str, Any], list[Drawn]]:
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
    reduced = full | {
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
    return reduced, [Drawn([("imgs",)], [(2, 0.9)], base=0.1)]


def mocov3(full: dict[str, Any]) -> tuple[dict[str, Any], list[Drawn]]:
    """Every tensor of the start, a part of each after the step."""
    reduced = full | {
        "grads": thin_all(full["grads"]),
        "state_after": thin_all(full["state_after"]),
        "sincos_224_768": thin(full["sincos_224_768"]),
    }
    # Both encoders began as one, and each got noise of its own.
    learned = [
        name.removeprefix("base_encoder.")
        for name, value in full["state_before"].items()
        if name.startswith("base_encoder.") and not name.endswith(("pos_embed", "tracked"))
        if "running" not in name and value.is_floating_point()
    ]
    momentum, base = (
        [("state_before", f"{net}_encoder.{name}") for name in learned]
        for net in ("momentum", "base")
    )
    return reduced, [
        Drawn([("x1",), ("x2",)], [(2, 1.0)]),
        Drawn(momentum, [(1, -0.05), (7, 0.05)], base=base),
    ]


def dino(full: dict[str, Any]) -> tuple[dict[str, Any], list[Drawn]]:
    """All six steps; gradients of the first alone."""
    case = full["norm_last_true"]
    steps = [{k: v for k, v in s.items() if k != "grads_before_clip"} for s in case["steps"]]
    steps[0]["grads_before_clip"] = thin_all(case["steps"][0]["grads_before_clip"])
    ends = {name: thin_all(case[name]) for name in ("student_final", "teacher_final")}
    reduced = full | {"norm_last_true": case | ends | {"steps": steps}}
    crops = [
        ("norm_last_true", "steps", i, "crops", j)
        for i, step in enumerate(steps)
        for j in range(len(step["crops"]))
    ]
    teacher, student = (
        [("norm_last_true", net, name) for name in case["student"]]
        for net in ("teacher", "student")
    )
    return reduced, [Drawn(crops, [(2, 1.0)]), Drawn(teacher, [(9, 0.02)], base=student)]


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
        tree, drawn = reduce(torch.load(folder / f"{name}.pt", weights_only=True))
        tree = compact(tree)
        tree["drawn"] = [d.pack(tree) for d in drawn]
        file = io.BytesIO()
        torch.save(tree, file)
        plain = file.getvalue() + bytes(-len(file.getvalue()) % 4)
        planes = np.frombuffer(plain, np.uint8).reshape(-1, 4).T
        data = lzma.compress(planes.tobytes(), preset=9 | lzma.PRESET_EXTREME)
        (OUT / f"{name}.pt.xz").write_bytes(data)
        print(f"{name}: {len(plain) / 1e6:.2f} MB, compressed {len(data) / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
