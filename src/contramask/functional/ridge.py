"""Ridge classification in closed form, with the exact prediction of every row from all others.

The one-hot targets are regressed on centred features with an intercept that is not penalised. The
fit is a linear smoother, so a row's leave-one-out residual is its residual over 1 - h_ii, h_ii its
entry of the hat matrix (Hastie, Tibshirani and Friedman, The Elements of Statistical Learning,
eq. 7.64): N refits cost one eigendecomposition.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from contramask.types import UserError

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
ALONE = 1e-10  # of 1 - h_ii: below, rounding is all that is left of it


class LeaveOneOut(NamedTuple):
    """What each row is taken for by a classifier that has not seen it."""

    scores: Float[Tensor, "*L N C"]  # of the chosen strength; near 1 for the class, 0 for others
    strength: Float[Tensor, "*L"]  # the chosen one
    accuracy: Float[Tensor, "*L S"]  # leave-one-out, of every strength


@torch.no_grad()
def leave_one_out_ridge(
    features: Float[Tensor, "*L N D"],
    labels: Int[Tensor, " N"],
    classes: int,
    strengths: tuple[float, ...] = STRENGTHS,
) -> LeaveOneOut:
    """Leave-one-out scores of ridge regression to one-hot targets, the strength chosen by accuracy.

        scores[i, c] = y_ic - (y_ic - yhat_ic) / (1 - h_ii)
        H = 1 1' / N + X (X'X + penalty)^-1 X',  penalty = strength * tr(X'X) / D,  X centred

    The penalty is that of the whole data in every refit: `strength` times the mean eigenvalue of
    the covariance, times N. One eigendecomposition of the smaller of (N, N) and (D, D), in float64,
    serves all strengths; of equal accuracies the first strength is taken. The accuracy of the
    chosen one is the best of `S` and so a little too high, by less the more rows there are.

    Leaving a row out makes its own class rarer among the others. Where features say nothing, the
    accuracy is therefore below chance: 0 for classes of equal size.

    Degenerate input: a constant channel is ignored; where all are constant, the scores are the
    shares of the classes among the other rows. A row that nothing else predicts (N = 1) has scores
    0. Without rows all is empty and accuracies are 0.

    Args:
        features: of N images, of any number of layers.
        labels: 0..classes-1.
        classes: C.
        strengths: above 0; S of them.

    Raises:
        UserError: for a strength that is not above 0, or a label outside 0..classes-1.
    """
    if not strengths or min(strengths) <= 0:
        raise UserError(
            f"ridge: strengths is {list(strengths)}; allowed are numbers above 0; set strengths"
        )
    if bool(((labels < 0) | (labels >= classes)).any()):
        raise UserError(
            f"ridge: labels lie in {int(labels.min())}..{int(labels.max())}; allowed are 0.."
            f"{classes - 1}; leave out images without a label or set the number of classes"
        )
    target = F.one_hot(labels.long(), classes).double()
    z, eigenvalues = _principal(features.double())
    mean = eigenvalues.sum(-1, keepdim=True) / features.shape[-1]
    best = target.new_zeros((*features.shape[:-1], classes))
    chosen, found = target.new_full(mean.shape[:-1], strengths[0]), []
    for strength in strengths:
        scores = _scores(z, eigenvalues + strength * mean, target)
        right = (scores.argmax(-1) == labels).double().sum(-1) / max(len(labels), 1)
        top = torch.stack(found).amax(0) if found else torch.full_like(right, -1.0)
        better = right > top
        best = scores.where(better[..., None, None], best)
        chosen = chosen.masked_fill(better, strength)
        found.append(right)
    return LeaveOneOut(best, chosen, torch.stack(found, -1))


def _principal(
    x: Float[Tensor, "*L N D"],
) -> tuple[Float[Tensor, "*L N R"], Float[Tensor, "*L R"]]:
    """Centred rows in the basis of their principal axes, R = min(N, D), and X'X there."""
    if x.shape[-2] == 0:
        return x[..., :0], x.new_zeros((*x.shape[:-2], 0))
    constant = x.amax(-2, keepdim=True) == x.amin(-2, keepdim=True)
    # Rounding of the mean must not become a feature, however small.
    x = (x - x.mean(-2, keepdim=True)).masked_fill(constant, 0.0)
    if x.shape[-2] <= x.shape[-1]:
        values, vectors = torch.linalg.eigh(x @ x.mT)
        values = values.clamp(min=0)
        return vectors * values.sqrt()[..., None, :], values
    values, vectors = torch.linalg.eigh(x.mT @ x)
    return x @ vectors, values.clamp(min=0)


def _scores(
    z: Float[Tensor, "*L N R"], penalised: Float[Tensor, "*L R"], target: Float[Tensor, "N C"]
) -> Float[Tensor, "*L N C"]:
    count = max(len(target), 1)
    # All 0 where there is no variance; one that is 0 beside others is no division by 0.
    inverse = torch.where(penalised > 0, 1 / penalised.where(penalised > 0, 1.0), 0.0)
    smoother = z * inverse[..., None, :]
    fitted = target.sum(0) / count + smoother @ (z.mT @ target)  # z is centred: y need not be
    left = 1 - 1 / count - (smoother * z).sum(-1, keepdim=True)  # 1 - h_ii
    alone = left < ALONE
    return (target - (target - fitted) / left.masked_fill(alone, 1.0)).masked_fill(alone, 0.0)
