"""The linear probe: softmax regression on frozen features, for a grid of learning rates at once.

All heads read the same batches, so a sweep costs one pass over the features: with G rates, F
features and C classes the weights are one tensor (G, F, C). The gradient is written out, which
needs no graph and works under inference mode.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from contramask.probes.probe import Probe
from contramask.schedule import Schedule
from contramask.types import UserError, fold


@dataclass(frozen=True)
class LinearRecipe:
    """How a linear probe is trained. There is no weight decay.

    Attributes:
        rates: learning rates for a batch of 256 rows, scaled linearly to the batch in use. With
            several, the best on the held-out rows of *train* is taken and trained again on all.
        epochs: passes over the features; the rate falls to zero along a cosine.
        batch: rows of a step; a bank of fewer is one batch. The remainder of a pass is left out,
            other rows each time.
        optimiser: `sgd` (MoCo v3, DINO, iBOT) or `lars` (MAE: rate 0.1, warm-up 0.11).
        momentum: of either.
        warmup: the fraction of training in which the rate rises from zero.
        batch_norm: normalise features by batch statistics first, without scale and shift (MAE).
        holdout: the fraction of train on which the rate is chosen.
        seed: of the initial weights, the order of rows and the split.
    """

    rates: tuple[float, ...] = (1e-4, 3e-4, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    epochs: int = 100
    batch: int = 1024
    optimiser: Literal["sgd", "lars"] = "sgd"
    momentum: float = 0.9
    warmup: float = 0.0
    batch_norm: bool = True
    holdout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        allowed = {
            "rates": (bool(self.rates) and min(self.rates, default=0) > 0, "positive numbers"),
            "epochs": (self.epochs >= 1, "at least 1"),
            "batch": (self.batch >= 2, "at least 2"),
            "warmup": (0 <= self.warmup < 1, "a fraction of training in [0, 1)"),
            "holdout": (0 < self.holdout < 1, "a fraction of the training images in (0, 1)"),
        }
        for name, (right, what) in allowed.items():
            if not right:
                raise UserError(
                    f"linear probe: {name} is {vars(self)[name]}; allowed is {what}; set {name} "
                    "in the recipe of the probe"
                )


class LinearProbe(Probe):
    """One linear head for each learning rate of the recipe; after `fit` the chosen one alone.

    Attributes:
        weight, bias: (G, F, C) and (G, C).
        rates: the learning rate of each head, for 256 rows.
        sweep: accuracy on the held-out rows for each rate, once `fit` has chosen.
        steps: how many calls of `learn` the schedule is laid out for.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor
    weight_speed: Tensor
    bias_speed: Tensor
    rate: Tensor
    eps = 1e-6  # of the batch norm (MAE)
    eta = 0.001  # trust coefficient of LARS

    def __init__(
        self,
        dim: int,
        classes: int,
        *,
        recipe: LinearRecipe = LinearRecipe(),
        steps: int = 1,
    ):
        super().__init__()
        self.recipe, self.steps, self.rows = recipe, steps, 0
        self.sweep: dict[float, float] = {}
        for name in ("weight", "bias", "mean", "variance"):
            self.register_buffer(name, torch.empty(0))
        for name in ("weight_speed", "bias_speed", "rate"):
            self.register_buffer(name, torch.empty(0), persistent=False)
        self._start(recipe.rates, dim, classes)

    @torch.no_grad()
    def learn(self, x: Float[Tensor, "B F"], y: Int[Tensor, " B"]) -> None:
        """One step of every head on one batch; B is at least 2 under batch norm."""
        x = self._normalise(x, batch_statistics=True)
        error = (torch.matmul(x, self.weight) + self.bias[:, None]).softmax(-1)  # (G, B, C)
        # Heads of a large rate are sure of themselves; numbers below float32's normal range would
        # make their product thirty times slower on a CPU.
        error = F.threshold(error, 1e-30, 0.0)
        error[:, torch.arange(len(y), device=y.device), y] -= 1
        error /= len(y)
        # d(mean cross-entropy): x^T (softmax - onehot) / B, for every head.
        self._move(torch.matmul(x.mT, error), error.sum(1), len(y))

    def heads(self, x: Float[Tensor, "B F"]) -> Float[Tensor, "G B C"]:
        """Logits of every head."""
        x = self._normalise(x.to(self.weight.device), batch_statistics=False)
        return torch.matmul(x, self.weight) + self.bias[:, None]

    @torch.no_grad()
    def predict(self, x: Float[Tensor, "B F"]) -> Float[Tensor, "B C"]:
        """Logits of the chosen head.

        Raises:
            UserError: while there are several.
        """
        if len(self.rates) > 1:
            raise UserError(
                f"linear probe: {len(self.rates)} rates and none is chosen yet; call fit, or give "
                "one rate"
            )
        return self.heads(x)[0]

    @torch.no_grad()
    def fit(self, x: Float[Tensor, "N F"], y: Int[Tensor, " N"]) -> None:
        """Choose the rate on held-out rows, then train that head anew on all rows.

        A pure function of the rows and the recipe: no global random number is drawn.

        Raises:
            UserError: for fewer than four rows, or if every rate diverges.
        """
        if len(x) < 4:
            raise UserError(f"linear probe: {len(x)} labelled images; give at least 4 to train on")
        dim, classes = self.weight.shape[1:]
        best = self.recipe.rates[0]
        if len(self.recipe.rates) > 1:
            order = torch.randperm(len(x), generator=self._generator("split"))
            held = max(1, round(len(x) * self.recipe.holdout))
            self._start(self.recipe.rates, dim, classes)
            self._train(x, y, order[held:])
            best = self._choose(x, y, order[:held])
        self._start((best,), dim, classes)
        self._train(x, y, torch.arange(len(x)))
        self.rows = len(x)

    @property
    def protocol(self) -> str:
        r = self.recipe
        rates = f"learning rate {self.rates[0]:g} x batch/256"
        if len(r.rates) > 1:
            edge = (
                " (the edge of the grid)" if self.rates[0] in (min(r.rates), max(r.rates)) else ""
            )
            rates += (
                f"{edge}, the best of {len(r.rates)} on {r.holdout:.0%} of train, "
                "then trained on all of it"
            )
        norm = "batch norm without affine" if r.batch_norm else "no batch norm"
        return (
            f"linear: {norm}, {r.optimiser.upper()} momentum {r.momentum:g}, no weight decay, "
            f"{rates}, cosine with warm-up {r.warmup:g}, {r.epochs} epochs of {self.rows} train "
            f"images in batches of {min(r.batch, self.rows)}, seed {r.seed}"
        )

    def _start(self, rates: tuple[float, ...], dim: int, classes: int) -> None:
        # Weights are changed in place later, inside and outside of inference mode.
        with torch.inference_mode(False):
            device, heads = self.weight.device, len(rates)
            weight = 0.01 * torch.randn((dim, classes), generator=self._generator("weights"))
            self.weight = weight.to(device).repeat(heads, 1, 1)  # all heads start alike
            self.bias = torch.zeros((heads, classes), device=device)
            self.weight_speed = torch.zeros_like(self.weight)
            self.bias_speed = torch.zeros_like(self.bias)
            self.rate = torch.tensor(rates, device=device)
            self.mean = torch.zeros(dim, device=device)
            self.variance = torch.ones(dim, device=device)
        self.rates, self.step = rates, 0

    def _generator(self, *place: int | str) -> torch.Generator:
        # On the host, so that every device sees the same numbers.
        return torch.Generator().manual_seed(fold(self.recipe.seed, *place))

    def _normalise(self, x: Tensor, *, batch_statistics: bool) -> Tensor:
        if not self.recipe.batch_norm:
            return x
        # Averaged over all batches seen: on frozen features the statistics do not drift, and a
        # moving average would still remember its start after the few steps of a small bank.
        return F.batch_norm(
            x,
            self.mean,
            self.variance,
            training=batch_statistics,
            momentum=1 / (self.step + 1),
            eps=self.eps,
        )

    def _train(self, x: Tensor, y: Tensor, rows: Tensor) -> None:
        batch = min(self.recipe.batch, len(rows))
        each = len(rows) // batch
        self.steps, device = each * self.recipe.epochs, self.weight.device
        for epoch in range(self.recipe.epochs):
            order = rows[torch.randperm(len(rows), generator=self._generator("order", epoch))]
            for part in order.to(x.device)[: each * batch].split(batch):
                self.learn(x[part].to(device), y[part].to(device))

    def _choose(self, x: Tensor, y: Tensor, rows: Tensor) -> float:
        right = torch.zeros(len(self.rates), device=self.weight.device)
        loss = torch.zeros_like(right)
        for part in rows.to(x.device).split(self.recipe.batch):
            scores, truth = self.heads(x[part]), y[part].to(right.device)
            right += (scores.argmax(-1) == truth).sum(1)
            log_p = scores.log_softmax(-1)
            loss -= log_p[:, torch.arange(len(truth), device=truth.device), truth].sum(1)
        accuracy = (right / len(rows)).where(loss.isfinite(), -1.0).tolist()
        self.sweep = dict(zip(self.rates, accuracy, strict=True))
        if max(accuracy) < 0:
            raise UserError(
                f"linear probe: every learning rate of {list(self.rates)} diverged; check that "
                "the features are finite, or set smaller rates in the recipe of the probe"
            )
        # Of equally accurate heads, the one of smaller loss.
        ranked = zip(accuracy, (-loss).tolist(), self.rates, strict=True)
        return max(row for row in ranked if row[0] >= 0)[2]

    def _move(self, weight: Tensor, bias: Tensor, rows: int) -> None:
        """v <- momentum v + g; w <- w - rate v, for each head with its own rate."""
        if self.recipe.optimiser == "lars":
            size, change = self.weight.norm(dim=(1, 2)), weight.norm(dim=(1, 2))
            trust = (self.eta * size / change).where((size > 0) & (change > 0), 1.0)
            weight = weight * trust[:, None, None]
        schedule = Schedule(peak=rows / 256, warmup=self.recipe.warmup)
        rates = schedule(min(self.step / self.steps, 1.0)) * self.rate
        self.weight_speed.mul_(self.recipe.momentum).add_(weight)
        self.bias_speed.mul_(self.recipe.momentum).add_(bias)
        self.weight.sub_(rates[:, None, None] * self.weight_speed)
        self.bias.sub_(rates[:, None] * self.bias_speed)
        self.step += 1
