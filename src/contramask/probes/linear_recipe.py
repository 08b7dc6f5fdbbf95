"""How a linear probe is trained: the numbers, and the update that they describe."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from contramask.schedule import Schedule
from contramask.types import UserError

Optimiser = Literal["sgd", "lars", "adamw"]


@dataclass(frozen=True)
class LinearRecipe:
    """How a linear probe is trained.

    Attributes:
        rates: learning rates for a batch of 256 rows, scaled linearly to the batch in use. With
            several, the best on the held-out part of *train* is taken.
        epochs: passes over the features; the rate falls to zero along a cosine.
        batch: rows of a step; a bank of fewer is one batch. The remainder of a pass is left out,
            other rows each time.
        optimiser: `sgd` (MoCo v3, DINO, iBOT), `lars` (MAE: rate 0.1, warm-up 0.11) or `adamw`
            (BEiT).
        momentum: of each; of `adamw` the first beta, its second is 0.999.
        warmup: the fraction of training in which the rate rises from zero.
        batch_norm: normalise features by batch statistics first, without scale and shift (MAE).
        holdout: the fraction of train on which the rate is chosen.
        seed: of the initial weights, the order of rows and the split.
        weight_decay: of weights, and but for `lars` of biases; `adamw` decouples it.
        per_epoch: the rate moves once an epoch, not at every step (MoCo v3, DINO, iBOT, BEiT).
        init_std: standard deviation of the initial weights; biases begin at zero.
    """

    rates: tuple[float, ...] = (1e-4, 3e-4, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    epochs: int = 100
    batch: int = 1024
    optimiser: Optimiser = "sgd"
    momentum: float = 0.9
    warmup: float = 0.0
    batch_norm: bool = True
    holdout: float = 0.1
    seed: int = 0
    weight_decay: float = 0.0
    per_epoch: bool = False
    init_std: float = 0.01

    def __post_init__(self) -> None:
        allowed = {
            "rates": (bool(self.rates) and min(self.rates, default=0) > 0, "positive numbers"),
            "epochs": (self.epochs >= 1, "at least 1"),
            "batch": (self.batch >= 2, "at least 2"),
            "momentum": (0 <= self.momentum < 1, "a number in [0, 1)"),
            "warmup": (0 <= self.warmup < 1, "a fraction of training in [0, 1)"),
            "holdout": (0 < self.holdout < 1, "a fraction of the training images in (0, 1)"),
            "weight_decay": (self.weight_decay >= 0, "zero or more"),
            "init_std": (self.init_std >= 0, "zero or more"),
        }
        for name, (right, what) in allowed.items():
            if not right:
                raise UserError(
                    f"linear probe: {name} is {vars(self)[name]}; allowed is {what}; set {name} "
                    "in the recipe of the probe"
                )

    def schedule(self, batch: int) -> Schedule:
        """What the rates are multiplied by, for so many rows a step."""
        stairs = self.epochs if self.per_epoch else None
        return Schedule(peak=batch / 256, warmup=self.warmup, stairs=stairs)

    def about(self) -> str:
        """The words of a protocol for what moves the weights."""
        norm = "batch norm without affine" if self.batch_norm else "no batch norm"
        decay = f"weight decay {self.weight_decay:g}" if self.weight_decay else "no weight decay"
        trust = f" (trust coefficient {Mover.eta:g})" if self.optimiser == "lars" else ""
        return f"{norm}, {self.optimiser.upper()} momentum {self.momentum:g}{trust}, {decay}"

    def curve(self) -> str:
        """The words of a protocol for how the rate moves."""
        once = " once an epoch" if self.per_epoch else ""
        return f"cosine{once} with warm-up {self.warmup:g}"


def diverged(rates: Sequence[float]) -> UserError:
    """What is raised where no head of these rates is of finite numbers."""
    return UserError(
        f"linear probe: every learning rate of {list(rates)} diverged; check that the features are "
        "finite, or set smaller rates in the recipe of the probe"
    )


class Mover:
    """The updates of G heads side by side, each as the optimiser of that name makes it.

    sgd: v <- momentum v + g, w <- w - rate v; lars: the same of g scaled to `eta` of the norm of
    the head's weight matrix (arXiv:1708.03888); adamw: arXiv:1711.05101.
    """

    eta = 0.001  # trust coefficient of LARS
    beta, eps = 0.999, 1e-8  # of AdamW

    def __init__(self, recipe: LinearRecipe):
        self.recipe = recipe

    def move(
        self,
        value: Float[Tensor, "G *shape"],
        gradient: Float[Tensor, "G *shape"],
        speed: Float[Tensor, "G *shape"],
        square: Float[Tensor, "..."],
        rates: Float[Tensor, " G"],
        *,
        update: int,
    ) -> None:
        """One update of weights (G, F, C) or biases (G, C), in place.

        Args:
            value: what is learned.
            gradient: of the loss of each head.
            speed: what momentum has gathered.
            square: the same for the gradient's square; read by `adamw` only.
            rates: of each head, now.
            update: how many there were before.
        """
        r, matrix = self.recipe, value.ndim == 3
        rates = rates.view(-1, *[1] * (value.ndim - 1))
        if r.optimiser == "adamw":
            value.mul_(1 - r.weight_decay * rates)
            speed.lerp_(gradient, 1 - r.momentum)
            square.mul_(self.beta).addcmul_(gradient, gradient, value=1 - self.beta)
            root = (square / (1 - self.beta ** (update + 1))).sqrt_().add_(self.eps)
            value.sub_(rates * (speed / (1 - r.momentum ** (update + 1))) / root)
            return
        if r.weight_decay and (matrix or r.optimiser == "sgd"):
            gradient = gradient + r.weight_decay * value
        if r.optimiser == "lars" and matrix:
            size, change = value.norm(dim=(1, 2)), gradient.norm(dim=(1, 2))
            trust = (self.eta * size / change).where((size > 0) & (change > 0), 1.0)
            gradient = gradient * trust[:, None, None]
        speed.mul_(r.momentum).add_(gradient)
        value.sub_(rates * speed)
