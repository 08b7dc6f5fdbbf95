"""The linear probe: softmax regression on frozen features, for a grid of learning rates at once.

All heads read the same batches, so a sweep costs one pass over the features: with G rates, F
features and C classes the weights are one tensor (G, F, C). The gradient is written out, which
needs no graph and works under inference mode.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from contramask.probes.linear_recipe import LinearRecipe as LinearRecipe
from contramask.probes.linear_recipe import Mover, diverged
from contramask.probes.probe import Probe
from contramask.types import UserError, fold

DEFAULT = LinearRecipe()


class LinearProbe(Probe):
    """One linear head for each learning rate of the recipe; after `fit` the chosen one alone.

    Attributes:
        weight, bias: (G, F, C) and (G, C).
        rates: the learning rate of each head, for 256 rows.
        sweep: accuracy on the held-out rows for each rate, once `fit` has chosen.
        steps: how many steps the schedule is laid out for.
        step: how many were made, by `learn` or `skip`.
        updates: how many of them moved the weights.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor
    weight_speed: Tensor
    bias_speed: Tensor
    weight_square: Tensor
    bias_square: Tensor
    rate: Tensor
    eps = 1e-6  # of the batch norm (MAE)

    def __init__(
        self,
        dim: int,
        classes: int,
        *,
        recipe: LinearRecipe = DEFAULT,
        steps: int = 1,
        resumable: bool = False,
    ):
        """Heads at their start.

        Args:
            dim: F.
            classes: C.
            recipe: how they are trained.
            steps: of the whole training; `fit` counts its own.
            resumable: whether the state holds what the optimiser has gathered. Beside it, `step`
                and `updates` are all that a training amid its steps goes on from.
        """
        super().__init__()
        self.recipe, self.steps, self.rows = recipe, steps, 0
        self.sweep: dict[float, float] = {}
        for name in ("weight", "bias", "mean", "variance"):
            self.register_buffer(name, torch.empty(0))
        for name in ("weight_speed", "bias_speed", "weight_square", "bias_square"):
            self.register_buffer(name, torch.empty(0), persistent=resumable)
        self.register_buffer("rate", torch.empty(0), persistent=False)
        self._start(recipe.rates, dim, classes)

    @torch.no_grad()
    def learn(
        self, x: Float[Tensor, "B F"], y: Int[Tensor, " B"], *, batch: int | None = None
    ) -> None:
        """One step of every head on one batch; B is at least 2 under batch norm.

        `batch` is the number of rows that rates are scaled to; None: B.
        """
        x = self._normalise(x, batch_statistics=True)
        error = (torch.matmul(x, self.weight) + self.bias[:, None]).softmax(-1)  # (G, B, C)
        # Heads of a large rate are sure of themselves; numbers below float32's normal range would
        # make their product thirty times slower on a CPU.
        error = F.threshold(error, 1e-30, 0.0)
        error[:, torch.arange(len(y), device=y.device), y] -= 1
        error /= len(y)
        # d(mean cross-entropy): x^T (softmax - onehot) / B, for every head.
        self._move(torch.matmul(x.mT, error), error.sum(1), batch or len(y))
        self.updates += 1
        self.step += 1

    def skip(self) -> None:
        """A step for which there are no rows: the schedule goes on, the weights stay."""
        self.step += 1

    @torch.no_grad()
    def tally(
        self, x: Float[Tensor, "B F"], y: Int[Tensor, " B"], *, tops: tuple[int, ...] = (1,)
    ) -> tuple[Float[Tensor, "T G"], Float[Tensor, " G"]]:
        """Of every head: the rows whose class is among its first 1, ...; the summed loss."""
        scores = self.heads(x)
        truth, found = y.to(scores.device), []
        for k in tops:
            first = scores.argmax(-1, keepdim=True) if k == 1 else scores.topk(k).indices
            found.append((first == truth[:, None]).any(-1).sum(1).float())
        log_p = scores.log_softmax(-1)
        loss = -log_p[:, torch.arange(len(truth), device=truth.device), truth].sum(1)
        return torch.stack(found), loss

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
            UserError: for fewer than four rows, or if every rate diverges, or the chosen one does
                once it is trained on all rows.
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
        few = slice(self.recipe.batch)  # one number that is not finite spoils the loss of all rows
        if not self.tally(x[few], y[few])[1].isfinite().all():
            raise diverged(self.rates)
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
        return (
            f"linear: {r.about()}, {rates}, {r.curve()}, {r.epochs} epochs of {self.rows} train "
            f"images in batches of {min(r.batch, self.rows)}, seed {r.seed}"
        )

    def _start(self, rates: tuple[float, ...], dim: int, classes: int) -> None:
        # Weights are changed in place later, inside and outside of inference mode.
        with torch.inference_mode(False):
            device, heads = self.weight.device, len(rates)
            generator = self._generator("weights")
            weight = self.recipe.init_std * torch.randn((dim, classes), generator=generator)
            self.weight = weight.to(device).repeat(heads, 1, 1)  # all heads start alike
            self.bias = torch.zeros((heads, classes), device=device)
            self.weight_speed = torch.zeros_like(self.weight)
            self.bias_speed = torch.zeros_like(self.bias)
            # Of no element where no optimiser reads them.
            adam = self.recipe.optimiser == "adamw"
            self.weight_square = torch.zeros_like(self.weight if adam else self.weight[:0])
            self.bias_square = torch.zeros_like(self.bias if adam else self.bias[:0])
            self.rate = torch.tensor(rates, device=device)
            self.mean = torch.zeros(dim, device=device)
            self.variance = torch.ones(dim, device=device)
        self.rates, self.step, self.updates = rates, 0, 0

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
            momentum=1 / (self.updates + 1),
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
            found, more = self.tally(x[part], y[part])
            right += found[0]
            loss += more
        accuracy = (right / len(rows)).where(loss.isfinite(), -1.0).tolist()
        self.sweep = dict(zip(self.rates, accuracy, strict=True))
        if max(accuracy) < 0:
            raise diverged(self.rates)
        # Of equally accurate heads, the one of smaller loss.
        ranked = zip(accuracy, (-loss).tolist(), self.rates, strict=True)
        return max(row for row in ranked if row[0] >= 0)[2]

    def _move(self, weight: Tensor, bias: Tensor, batch: int) -> None:
        """Each head with its own rate."""
        rates = self.recipe.schedule(batch)(min(self.step / self.steps, 1.0)) * self.rate
        mover = Mover(self.recipe)
        for value, gradient, speed, square in (
            (self.weight, weight, self.weight_speed, self.weight_square),
            (self.bias, bias, self.bias_speed, self.bias_square),
        ):
            mover.move(value, gradient, speed, square, rates, update=self.updates)
