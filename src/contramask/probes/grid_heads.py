"""All heads that read one input: the same feature, normed in the same way, one rate each.

Their weights are one matrix (F, G * C), so that a batch costs one product forward and one for the
gradient, however many heads there are. What they compute is what `LinearProbe` computes.
"""

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from contramask.probes.linear import LinearRecipe
from contramask.probes.linear_recipe import Mover
from contramask.types import fold

VectorNorm = Literal["none", "batch", "layer"]
EPS = 1e-6  # of both norms (MAE's batch norm)


def drawn(recipe: LinearRecipe, *place: int | str) -> torch.Generator:
    """The random numbers of a place, on the host, so that every device sees the same."""
    return torch.Generator().manual_seed(fold(recipe.seed, *place))


class Heads:
    """G linear heads on (F,) vectors.

    Attributes:
        weight, bias: (F, G * C), head after head, and (G * C,).

    Args:
        dim: F.
        classes: C.
        rates: of the heads, for 256 rows.
        recipe: how they are trained; `rates` and `batch_norm` are not read.
        norm: of the vector. `batch`: statistics of the batch in training, and afterwards their mean
            over all batches seen; `layer`: of the vector itself; neither has scale or shift.
        steps: of the training.
        device: where the weights are.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        rates: tuple[float, ...],
        *,
        recipe: LinearRecipe,
        norm: VectorNorm,
        steps: int,
        device: torch.device,
    ):
        self.rates, self.norm, self.classes, self.steps = rates, norm, classes, steps
        self.recipe = replace(recipe, rates=rates, batch_norm=norm == "batch")
        start = recipe.init_std * torch.randn((dim, classes), generator=drawn(recipe, "weights"))
        self.weight = start.to(device).repeat(1, len(rates))  # all heads start alike
        self.bias = torch.zeros(len(rates) * classes, device=device)
        self.mean, self.variance = torch.zeros((2, dim), device=device)
        self.rate = torch.tensor(rates, device=device)
        self.moved = [torch.zeros_like(p) for p in (self.weight, self.bias)]
        adam = recipe.optimiser == "adamw"
        self.square = [torch.zeros_like(p if adam else p[:0]) for p in (self.weight, self.bias)]
        self.done = 0

    def step(self, x: Float[Tensor, "B F"], y: Int[Tensor, " B"]) -> None:
        """One step of every head on one batch; B is at least 2 under batch norm."""
        x = self.normed(x, training=True)
        error = torch.addmm(self.bias, x, self.weight).view(len(y), -1, self.classes).softmax(-1)
        # Heads of a large rate are sure of themselves; numbers below float32's normal range would
        # make their product thirty times slower on a CPU.
        torch.threshold_(error, 1e-30, 0.0)
        error[torch.arange(len(y), device=y.device), :, y] -= 1
        self._move(x, error.view(len(y), -1))
        self.done += 1

    def logits(self, x: Float[Tensor, "B F"]) -> Float[Tensor, "B G C"]:
        """Scores of every head."""
        x = self.normed(x, training=False)
        return torch.addmm(self.bias, x, self.weight).view(len(x), -1, self.classes)

    def normed(self, x: Float[Tensor, "B F"], *, training: bool) -> Float[Tensor, "B F"]:
        """What the heads read of a batch; in training its statistics are remembered."""
        if self.norm == "none":
            return x
        if self.norm == "layer":
            return F.layer_norm(x, x.shape[1:], eps=EPS)
        momentum = 1 / (self.done + 1)  # a mean over batches: frozen features do not drift
        return F.batch_norm(
            x, self.mean, self.variance, training=training, momentum=momentum, eps=EPS
        )

    def _move(self, x: Tensor, error: Tensor) -> None:
        r, rows = self.recipe, len(x)
        factor = r.schedule(rows)(min(self.done / self.steps, 1.0))
        (weight, bias), share = self.moved, 1 / rows  # of the mean cross-entropy
        if r.optimiser == "sgd" and not r.weight_decay:
            weight.addmm_(x.mT, error, beta=r.momentum, alpha=share)
            bias.mul_(r.momentum).add_(error.sum(0), alpha=share)
            each = self.rate.repeat_interleave(self.classes)
            self.weight.addcmul_(weight, each, value=-factor)
            self.bias.addcmul_(bias, each, value=-factor)
            return
        mover, rates = Mover(r), factor * self.rate
        gradients = (torch.matmul(x.mT, error) * share, error.sum(0) * share)
        for i, value in enumerate((self.weight, self.bias)):
            mover.move(
                self._by_head(value),
                self._by_head(gradients[i]),
                self._by_head(self.moved[i]),
                self._by_head(self.square[i]),
                rates,
                update=self.done,
            )

    def _by_head(self, values: Tensor) -> Tensor:
        """A view (G, F, C) of what belongs to the weights, (G, C) of what to the biases."""
        shape = (*values.shape[:-1], len(self.rates), self.classes)
        return values.view(shape).movedim(-2, 0) if len(values) else values
