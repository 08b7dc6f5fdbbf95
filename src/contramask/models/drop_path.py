"""Drop path that leaves out a fixed number of samples, as DINOv2 does. arXiv:2304.07193."""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from contramask.errors import need_one_of

DropPaths = Literal["growing", "uniform", "subset"]


class SubsetDropPath(nn.Module):
    """Keep a residual branch for n = max(int(B (1 - rate)), 1) random samples of B.

    They are scaled by B / n, the others get 0; in evaluation nothing happens. The authors compute
    the branch for the kept samples only; here it is computed for all, with the same result. The
    draw is of torch's default generator on the device of the samples, as timm's drop path.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.drop_prob = rate

    def forward(self, x: Float[Tensor, "B *S"]) -> Float[Tensor, "B *S"]:
        if not self.training:
            return x
        batch = x.shape[0]
        kept = max(int(batch * (1 - self.drop_prob)), 1)
        chosen = torch.randperm(batch, device=x.device)[:kept]
        scale = x.new_zeros(batch).index_fill(0, chosen, batch / kept)
        return x * scale.view(-1, *[1] * (x.ndim - 1))

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


def set_drop_paths(
    blocks: Iterable[nn.Module],
    kind: DropPaths,
    rate: float,
    *,
    uniform: Callable[[float], nn.Module],
) -> None:
    """Replace the drop path of both branches of every block, unless it grows as timm makes it.

    Args:
        blocks: timm's.
        kind: `growing`: nothing is done; `uniform` or `subset`: one rate for all.
        rate: the probability that a branch is left out for a sample; 0: nothing is done.
        uniform: makes a drop path that draws for each sample, of its rate.
    """
    need_one_of(kind, DropPaths, "drop_path", "model.backbone.init_args.drop_path")
    if kind == "growing" or rate == 0:
        return
    make = uniform if kind == "uniform" else SubsetDropPath
    for block in blocks:
        block.drop_path1, block.drop_path2 = make(rate), make(rate)
