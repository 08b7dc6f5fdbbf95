"""The linear probe of single patches: its learning rate is chosen on whole images."""

from jaxtyping import Bool, Int
from torch import Tensor

from contramask.probes.grouped_linear import GroupedLinear
from contramask.types import UserError


class PatchLinear(GroupedLinear):
    """A linear layer on patches, whose groups are images. Neighbouring patches are alike."""

    def held_out(self, groups: Int[Tensor, " N"]) -> Bool[Tensor, " N"]:
        """Which rows belong to held-out images. Raises `UserError` for fewer than two images."""
        if len(groups.unique()) < 2:
            raise UserError(
                "linear per patch: there is 1 train image with labels, and rates are chosen on "
                "held-out images; give two or more, or one rate (--recipe.rates '[0.1]')"
            )
        return super().held_out(groups)

    @property
    def protocol(self) -> str:
        r = self.recipe
        rates = f"learning rate {r.rates[0]:g} x batch/256"
        if len(r.rates) > 1:
            rates = (
                f"the best of {len(r.rates)} learning rates on patches of {r.holdout:.0%} of the "
                "train images, then trained on all of them"
            )
        return (
            f"linear: {r.about()}, {rates}, {r.curve()}, {r.epochs} epochs in batches of "
            f"{min(r.batch, self.rows)} patches, seed {r.seed}"
        )
