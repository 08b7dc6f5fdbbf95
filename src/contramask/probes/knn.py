"""The k-NN probe of DINO (arXiv:2104.14294): no training, nothing to tune but k."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from contramask.functional.neighbours import vote
from contramask.probes.probe import Probe
from contramask.types import UserError


class KNN(Probe):
    """Weighted vote of the k nearest training images by cosine, weights exp(cosine / T).

    Memory: the bank (4 F bytes for an image), the search (`bytes_held`) and the votes of the batch.
    For other metrics, cleaned features and banks over ranks see `Scores`.
    """

    def __init__(
        self,
        classes: int,
        *,
        ks: tuple[int, ...] = (10, 20, 100, 200),
        temperature: float = 0.07,
    ):
        super().__init__()
        self.classes, self.ks, self.temperature = classes, ks, temperature
        self._parts: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def learn(self, x: Float[Tensor, "B F"], y: Int[Tensor, " B"]) -> None:
        """Add rows to the bank."""
        self._parts.append((x, y))

    def fit(self, x: Float[Tensor, "N F"], y: Int[Tensor, " N"]) -> None:
        """Make these rows the bank, in place of whatever it held."""
        self._parts.clear()
        self.learn(x, y)

    def votes(self, x: Float[Tensor, "B F"]) -> dict[int, Float[Tensor, "B C"]]:
        """Votes per class for every k, from one search.

        Raises:
            UserError: for a k larger than the bank.
        """
        bank, labels = self._bank()
        return vote(
            x.to(bank.device),
            bank,
            labels,
            ks=self.ks,
            classes=self.classes,
            temperature=self.temperature,
        )

    def predict(self, x: Float[Tensor, "B F"]) -> Float[Tensor, "B C"]:
        """Votes per class for the first of `ks`."""
        return self.votes(x)[self.ks[0]]

    @property
    def protocol(self) -> str:
        ks = ",".join(map(str, self.ks))
        return (
            f"k-NN: cosine, k = {ks}, votes weighted by exp(cosine/{self.temperature:g}), "
            f"bank of {sum(len(y) for _, y in self._parts)} train images"
        )

    def _bank(self) -> tuple[Tensor, Tensor]:
        if not self._parts:
            raise UserError("k-NN: the bank is empty; call learn or fit with labelled features")
        if len(self._parts) > 1:  # joined once, not at every query
            x, y = zip(*self._parts, strict=True)
            self._parts = [(torch.cat(x), torch.cat(y))]
        return self._parts[0]
