"""Running moments of features: count, mean and covariance of what came in batches, in float64."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of rows, of any number of layers at once.

    Parts of the data are merged by `+` (Chan et al., 1983, Updating formulae and a pairwise
    algorithm for computing sample variances), which loses no digits however far the mean is from
    0: `sum(parts, Moments.empty(...))`. Over ranks: gather the three tensors and add.
    """

    count: Float[Tensor, ""]
    mean: Float[Tensor, "*L D"]
    scatter: Float[Tensor, "*L D D"]  # sum of outer products of the deviations from the mean

    @classmethod
    def of(cls, rows: Float[Tensor, "*L N D"]) -> "Moments":
        """Moments of some rows; of none those of `empty`."""
        x = rows.detach().double()
        count = x.new_tensor(float(x.shape[-2]))
        mean = x.sum(-2) / count.clamp(min=1)
        x = x - mean[..., None, :]
        return cls(count, mean, x.mT @ x)

    @classmethod
    def empty(cls, *shape: int, device: torch.device | str = "cpu") -> "Moments":
        """Of no rows, of shape (..., D): adding them changes nothing."""
        mean = torch.zeros(shape, dtype=torch.float64, device=device)
        return cls(mean.new_zeros(()), mean, mean.new_zeros((*shape, shape[-1])))

    def __add__(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        share = other.count / count.clamp(min=1)
        apart = other.mean - self.mean
        between = apart[..., :, None] * apart[..., None, :] * (self.count * share)
        scatter = self.scatter + other.scatter + between
        return Moments(count, self.mean + share * apart, scatter)

    def covariance(self) -> Float[Tensor, "*L D D"]:
        """Divided by the count, not by one less; 0 of one row and of none."""
        return self.scatter / self.count.clamp(min=1)

    def second_moment(self) -> Float[Tensor, "*L D D"]:
        """The mean outer product of the rows as they are, not centred."""
        return self.covariance() + self.mean[..., :, None] * self.mean[..., None, :]

    def variance(self) -> Float[Tensor, "*L D"]:
        """Of every channel."""
        return self.covariance().diagonal(dim1=-2, dim2=-1)
