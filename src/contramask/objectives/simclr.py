"""Two views of an image find each other among all images of the batch. Chen et al., 2020.

arXiv:2002.05709 (eq. 1); projection head and BN from arXiv:2006.10029. The official code is for
ResNets; what is its own here is the loss, the head and the gather with gradient.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from contramask.distributed import gather_with_gradient, rank
from contramask.functional.contrast import nt_xent
from contramask.models.heads import BlockReader, mlp
from contramask.objectives.objective import Feats, Objective, need_batch, need_crops
from contramask.types import Batch, Loss, Pass, Spec, Step


class SimCLR(Objective):
    """NT-Xent over both directions.

    Args:
        spec: of the backbone.
        view: the group of two crops it compares.
        mask: hides patches of the views, if given.
        temperature: of the softmax; 0.1 for ImageNet, 0.5 for CIFAR-10.
        out: width of the projection.
        hidden: width of the hidden layers; None: the backbone's.
        layers: of the projection head; 3 in SimCLR v2, 2 in the paper.
        scale: of the loss. 1 is the authors' code, twice the mean over the 2 M anchors; 0.5 is
            that mean, which most reimplementations minimise.
        layer: number of the block, from 0, whose tokens it reads, or a fraction of the depth;
            None: the last.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        view: str = "global",
        mask: str | None = None,
        temperature: float = 0.1,
        out: int = 128,
        hidden: int | None = None,
        layers: int = 3,
        scale: float = 1.0,
        layer: int | float | None = None,
    ):
        super().__init__()
        self.read = BlockReader(spec, layer)
        self.layer = self.read.block
        self.passes = (Pass(view, mask, layers=self.read.layers),)
        self.temperature, self.scale = temperature, scale
        widths = [spec.dim, *[hidden or spec.dim] * (layers - 1), out]
        self.head = mlp(*widths, last="batch_norm_no_bias")
        for module in self.head:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)  # as the official dense layers

    def check(self, crops: Mapping[str, int], batch: int) -> None:
        super().check(crops, batch)
        need_crops("SimCLR", self.passes[0].view, crops, 2)
        need_batch("SimCLR", batch)

    def forward(self, feats: Feats, batch: Batch, step: Step) -> Loss:
        # One view at a time: batch norm must not mix the two views.
        a, b = (
            F.normalize(self.head(x), dim=-1) for x in self.read(feats[self.passes[0]]).cls.chunk(2)
        )
        all_a, all_b = gather_with_gradient(a), gather_with_gradient(b)
        loss = nt_xent(a, b, all_a, all_b, self.temperature, offset=rank() * len(a))
        return Loss(self.scale * loss, {"similarity": _mean_dot(a, b)})


def _mean_dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.detach() * b.detach()).sum(-1).mean()
