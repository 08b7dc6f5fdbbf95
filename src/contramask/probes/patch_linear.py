"""The linear probe of single patches: its learning rate is chosen on whole images."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contramask.probes.linear import LinearProbe
from contramask.types import UserError


class PatchLinear(LinearProbe):
    """A linear layer on patches. Its rate is chosen on held-out images, not on single patches.

    Neighbouring patches are alike, so a patch of a train image tells little that is new.
    """

    @torch.no_grad()
    def fit(
        self,
        x: Float[Tensor, "N F"],
        y: Int[Tensor, " N"],
        image: Int[Tensor, " N"] | None = None,
    ) -> None:
        """Choose the rate on the rows of held-out images, then train that head anew on all rows.

        Args:
            x: features.
            y: labels, 0..C-1.
            image: the number of each row's image; None: each row is one.

        Raises:
            UserError: for fewer than four rows, one image where a rate is to be chosen, or if every
                rate diverges.
        """
        if image is None or len(self.recipe.rates) == 1 or len(x) < 4:
            super().fit(x, y)
            return
        held = self.held_out(image).cpu()
        dim, classes = self.weight.shape[1:]
        self._start(self.recipe.rates, dim, classes)
        self._train(x, y, (~held).nonzero()[:, 0])
        best = self._choose(x, y, held.nonzero()[:, 0])
        self._start((best,), dim, classes)
        self._train(x, y, torch.arange(len(x)))
        self.rows = len(x)

    def held_out(self, image: Int[Tensor, " N"]) -> Bool[Tensor, " N"]:
        """Which rows belong to held-out images. Raises `UserError` for fewer than two images."""
        images = image.unique()
        if len(images) < 2:
            raise UserError(
                "linear per patch: there is 1 train image with labels, and rates are chosen on "
                "held-out images; give two or more, or one rate (--recipe.rates '[0.1]')"
            )
        order = torch.randperm(len(images), generator=self._generator("split"))
        count = min(len(images) - 1, max(1, round(len(images) * self.recipe.holdout)))
        return torch.isin(image, images[order[:count].to(images.device)])

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
