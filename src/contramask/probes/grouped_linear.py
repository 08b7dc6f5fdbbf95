"""A linear probe of rows that are alike in groups: its learning rate is chosen on whole groups."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contramask.probes.linear import LinearProbe
from contramask.types import UserError


class GroupedLinear(LinearProbe):
    """A linear probe whose rate is chosen on held-out groups, not on single rows.

    Rows of a group are alike (patches of an image, images made of one picture), so a held-out row
    of which the group is trained on tells little that is new.
    """

    @torch.no_grad()
    def fit(
        self,
        x: Float[Tensor, "N F"],
        y: Int[Tensor, " N"],
        groups: Int[Tensor, " N"] | None = None,
    ) -> None:
        """Choose the rate on the rows of held-out groups, then train that head anew on all rows.

        Args:
            x: features.
            y: labels, 0..C-1.
            groups: the number of each row's group; None: each row is one.

        Raises:
            UserError: for fewer than four rows, one group where a rate is to be chosen, or if every
                rate diverges, or the chosen one does once it is trained on all rows.
        """
        if groups is None or len(self.recipe.rates) == 1 or len(x) < 4:
            super().fit(x, y)
            return
        held = self.held_out(groups).cpu()
        dim, classes = self.weight.shape[1:]
        self._start(self.recipe.rates, dim, classes)
        self._train(x, y, (~held).nonzero()[:, 0])
        best = self._choose(x, y, held.nonzero()[:, 0])
        whole, self.recipe = self.recipe, replace(self.recipe, rates=(best,))
        try:
            super().fit(x, y)
        finally:
            self.recipe = whole

    def held_out(self, groups: Int[Tensor, " N"]) -> Bool[Tensor, " N"]:
        """Which rows belong to held-out groups. Raises `UserError` for fewer than two groups."""
        numbers = groups.unique()
        if len(numbers) < 2:
            raise UserError(
                "linear probe: all rows are of one group, and rates are chosen on held-out groups; "
                "give rows of two or more, or one rate"
            )
        order = torch.randperm(len(numbers), generator=self._generator("split"))
        count = min(len(numbers) - 1, max(1, round(len(numbers) * self.recipe.holdout)))
        return torch.isin(groups, numbers[order[:count].to(numbers.device)])
