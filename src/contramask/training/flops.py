"""Floating-point operations of a training step, counted from the shapes that really pass.

A multiplication and its addition are two operations; norms, activations, softmax and the loss
itself are left out (below 1 % of a ViT). Forward counts once; backward once more for the gradient
of the weights and once for that of the input. Nothing is run for the count, copied or drawn at
random, so training is bitwise the same with it and without it.
"""

import re
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from contramask.types import Batch, Pass, Spec, Tokens


class _Sized(Protocol):
    spec: Spec

    def modules(self) -> Iterable[nn.Module]: ...


@runtime_checkable
class Planned(Protocol):
    """A training module whose backbone's passes are known."""

    backbone: Any
    objectives: nn.ModuleDict
    plan: Mapping[Pass, tuple[Pass, ...]]


def vit_forward_flops(*, dim: int, depth: int, tokens: int, mlp_ratio: float = 4.0) -> int:
    """Operations of the blocks of a ViT on one image of `tokens` tokens, without the embedding.

    A block has 4 dim^2 weights in its attention and 2 mlp_ratio dim^2 in its MLP, each used once
    a token, and two products of (tokens x tokens) attention with dim channels.
    """
    weights = 4 * dim**2 + 2 * dim * int(mlp_ratio * dim)
    return depth * (2 * weights * tokens + 4 * tokens**2 * dim)


def patch_embed_flops(*, dim: int, patch: int, patches: int) -> int:
    """Operations of the projection of an image's patches: of all, also those dropped after it."""
    return 2 * 3 * patch**2 * dim * patches


class StepFlops:
    """Counts one micro-batch of a `Planned` module while it is computed.

    Between `__enter__` and `__exit__` objectives note the tokens they are given and their layers
    the shapes of their inputs: so the count knows registers, crops of every size and what a mask
    left. The backbone's own share follows from its weights; it is the same for compiled ones.

    What objectives compute without a layer (products of features with each other) is left out.
    """

    def __init__(self, module: Planned):
        self.module = module
        self.heads = 0
        self.tokens: dict[Pass, tuple[int, int]] = {}  # images (crops), tokens of each
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "StepFlops":
        for objective in self.module.objectives.values():
            self._handles.append(objective.register_forward_pre_hook(self._note))
            for layer in objective.modules():
                if isinstance(layer, nn.Linear | nn.Conv2d) or _attends(layer):
                    self._handles.append(layer.register_forward_hook(self._count))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def total(self, batch: Batch) -> int:
        """Operations of the micro-batch that was computed."""
        return self.heads + sum(self._pass(reads, batch) for reads in self.tokens)

    def _pass(self, reads: Pass, batch: Batch) -> int:
        backbone: _Sized = self.module.backbone
        spec, (images, tokens) = backbone.spec, self.tokens[reads]
        height, width = batch["views"][reads.view].shape[-2:]
        patches = (height // spec.patch) * (width // spec.patch)
        layers = [m for m in backbone.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        embed = [m for m in layers if isinstance(m, nn.Conv2d)]
        weights = sum(m.weight.numel() for m in layers if isinstance(m, nn.Linear))
        blocks = 2 * weights * tokens + 4 * tokens**2 * spec.dim * spec.depth
        projection = 2 * sum(m.weight.numel() for m in embed) * patches
        if reads.net == "teacher":
            return images * (blocks + projection)
        # Images need no gradient.
        learned = any(m.weight.requires_grad for m in embed)
        return images * (3 * blocks + (2 if learned else 1) * projection)

    def _note(self, objective: nn.Module, inputs: tuple[Any, ...]) -> None:
        feats: dict[Pass, Tokens] = inputs[0]
        for reads, (served, *_) in self.module.plan.items():
            prefix, patch = feats[served].prefix, feats[served].patch
            self.tokens[reads] = (len(patch), prefix.shape[1] + patch.shape[1])

    def _count(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():  # leave no trace in a graph that stays
            return
        x: Tensor = inputs[0]
        if isinstance(layer, nn.Linear | nn.Conv2d):
            forward = 2 * (output.numel() // layer.weight.shape[0]) * layer.weight.numel()
            gradients = int(layer.weight.requires_grad) + int(x.requires_grad)
        else:
            forward, gradients = 4 * x.shape[-2] * x.numel(), 2 * int(x.requires_grad)
        self.heads += forward * (1 + gradients * int(torch.is_grad_enabled()))


def _attends(layer: nn.Module) -> bool:
    """Whether a module multiplies (tokens x tokens) attention, beside what its layers do."""
    return type(layer).__name__ == "Attention"


# Dense TFLOP/s of tensor cores as the makers' data sheets give them: bfloat16, float16 (both
# accumulated in float32), TF32, and float32 outside of tensor cores. First match wins.
_PEAKS: tuple[tuple[str, tuple[float | None, float | None, float | None, float | None]], ...] = (
    (r"\bB200\b", (2250, 2250, 1125, 75)),
    (r"\bH[12]00 NVL\b", (835.5, 835.5, 417.7, 60)),
    (r"\bH100 PCIe\b", (756, 756, 378, 51.2)),
    (r"\b(H100|H200|H800|GH200)\b", (989.4, 989.4, 494.7, 66.9)),
    (r"\bA[18]00\b", (312, 312, 156, 19.5)),
    (r"\bA30\b", (165, 165, 82, 10.3)),
    (r"\bA40\b", (149.7, 149.7, 74.8, 37.4)),
    (r"\bA10\b", (125, 125, 62.5, 31.2)),
    (r"\bRTX A6000\b", (154.8, 154.8, 77.4, 38.7)),
    (r"\bRTX 6000 Ada\b", (364.2, 364.2, 182.1, 91.1)),
    (r"\bL40S\b", (362.1, 362.1, 183, 91.6)),
    (r"\bL40\b", (181, 181, 90.5, 90.5)),
    (r"\bL4\b", (121, 121, 60, 30.3)),
    (r"\bV100S\b", (None, 130, None, 16.4)),
    (r"\bV100.*PCIE\b", (None, 112, None, 14)),
    (r"\bV100\b", (None, 125, None, 15.7)),
    (r"\bT4\b", (None, 65, None, 8.1)),
    (r"\bRTX 3090$", (71, 71, 35.6, 35.6)),
    (r"\bRTX 4090$", (165.2, 165.2, 82.6, 82.6)),
    (r"\bRTX 5090$", (209.5, 209.5, 104.8, 104.8)),
    (r"\bMI300X\b", (1307.4, 1307.4, 653.7, 163.4)),
)


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> float | None:
    """Operations a second that a device promises for dense matrix products; None if unknown.

    Args:
        device: a CUDA device, or the name of a GPU as its driver tells it.
        dtype: of the operands; float32 means TF32 where `torch.set_float32_matmul_precision`
            allows it.
    """
    if isinstance(device, torch.device):
        if device.type != "cuda":
            return None
        device = torch.cuda.get_device_name(device)
    tf32 = torch.get_float32_matmul_precision() != "highest"
    column = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2 if tf32 else 3}.get(dtype)
    for pattern, peaks in _PEAKS:
        if column is not None and re.search(pattern, device):
            peak = peaks[column]
            if peak is None and dtype == torch.float32:  # no TF32: float32 stays float32
                peak = peaks[3]
            return None if peak is None else peak * 1e12
    return None
