"""Bounds on gradients: of all parameters together, of each module, or of each tensor."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from contramask.errors import UserError, need_one_of

Per = Literal["model", "module", "tensor"]


@dataclass(frozen=True)
class Clip:
    """The largest norm a gradient may have; longer ones are shortened to it.

    Attributes:
        norm: the bound.
        per: `model`, of all parameters together; `module`, of the backbone (with the tokens that
            stand for hidden patches), of each part of each objective and, where the part is
            `heads`, of each head (DINOv2, arXiv:2304.07193); `tensor`, of each parameter by itself
            (DINO, arXiv:2104.14294, and iBOT): another method than `model`, although their flag
            has the same name.
    """

    norm: float
    per: Per = "model"

    def __post_init__(self) -> None:
        need_one_of(self.per, Per, "optim: clip.per", "model.optim.clip.per")
        if self.norm <= 0:
            raise UserError(f"clip is {self.norm}; the norm is above 0; set model.optim.clip")

    @torch.no_grad()
    def __call__(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Shorten the gradients in place."""
        parts: dict[str, list[Tensor]] = {}
        for name, parameter in parameters:
            if parameter.grad is not None:
                parts.setdefault(self._part(name), []).append(parameter.grad)
        if self.per == "tensor":
            _shorten_each([g for part in parts.values() for g in part], self.norm)
            return
        for gradients in parts.values():
            norm = nn.utils.get_total_norm(gradients)
            _scale(gradients, [self.norm / (norm + 1e-6)] * len(gradients))

    def _part(self, name: str) -> str:
        if self.per != "module":
            return ""
        words = name.split(".")
        if words[0] != "objectives":
            return "backbone"
        return ".".join(words[: 4 if words[2:3] == ["heads"] else 3])


def _shorten_each(gradients: Sequence[Tensor], norm: float) -> None:
    norms = torch._foreach_norm(gradients)  # pyright: ignore
    _scale(gradients, [norm / (n + 1e-6) for n in norms])


def _scale(gradients: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    # Multiplied also where the factor is 1: a branch would wait for the device.
    small = [f.clamp(max=1.0).to(g.device) for f, g in zip(factors, gradients, strict=True)]
    torch._foreach_mul_(gradients, small)  # pyright: ignore
