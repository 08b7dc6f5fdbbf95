"""What every objective promises: it declares its passes and maps their tokens to a scalar."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from contramask.types import Batch, Loss, Pass, Step, Tokens, UserError

Feats = Mapping[Pass, Tokens]


class Objective(nn.Module, ABC):
    """A term of the loss: declares its passes, owns its heads, returns a scalar.

    Subclasses are final and take the backbone's `Spec` as first argument. They receive tokens, not
    a backbone: they cannot run a hidden forward, and are tested with random tensors alone.
    """

    passes: tuple[Pass, ...]
    layer: int | None = None  # the block whose tokens it reads in place of the last ones

    @abstractmethod
    def forward(self, feats: Feats, batch: Batch, step: Step) -> Loss:
        """The loss of a micro-batch. Temperatures and the like are functions of `step`."""

    def check(self, crops: Mapping[str, int], batch: int) -> None:
        """Refuse data it cannot learn from, before the first step.

        Args:
            crops: how many crops each view has.
            batch: images per device.

        Raises:
            UserError: naming what is missing and where to add it.
        """
        for reads in self.passes:
            if reads.view not in crops:
                raise UserError(
                    f"{type(self).__name__} reads view {reads.view!r}; data.views has "
                    f"{', '.join(crops) or 'none'}; add it there or set the objective's view"
                )

    def picture(
        self, feats: Feats, batch: Batch, step: Step
    ) -> dict[str, Float[Tensor, "n 3 H W"]]:
        """Pictures in the normalised space of the views, for people; none by default."""
        return {}


def need_crops(name: str, view: str, crops: Mapping[str, int], number: int) -> None:
    """Raise a `UserError` unless `view` has `number` crops."""
    if crops[view] != number:
        raise UserError(
            f"{name} compares {number} crops of an image, view {view!r} has {crops[view]}; "
            f"set data.views.{view}.number"
        )


def need_batch(name: str, batch: int) -> None:
    """Raise a `UserError` unless a batch has two images."""
    if batch < 2:
        raise UserError(
            f"{name} tells images of a batch apart and normalises over it: it needs at least 2 "
            f"images per device, given {batch}; set data.batch_size"
        )


def need_fill(name: str, tokens: Tokens, reads: Pass) -> None:
    """Raise a `UserError` unless the pass put a token in the place of each hidden patch."""
    assert tokens.mask is not None
    if tokens.patch.shape[1] != tokens.mask.hidden.shape[1]:
        raise UserError(
            f"{name} predicts hidden patches from the tokens in their place, mask {reads.mask!r} "
            "drops them; set model.masks.NAME.init_args.fill: true"
        )
