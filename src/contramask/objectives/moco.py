"""Predict the momentum encoder's view of the same image. Chen, Xie and He, 2021: MoCo v3.

arXiv:2104.02057, algorithm 1.
"""

from collections.abc import Mapping

import torch.nn.functional as F

from contramask.distributed import gather, rank
from contramask.functional.contrast import infonce
from contramask.models.ema import EmaCopy
from contramask.models.heads import BlockReader, mlp
from contramask.objectives.objective import Feats, Objective, need_batch, need_crops
from contramask.types import Batch, Loss, Pass, Spec, Step


class MoCoV3(Objective):
    """Symmetric InfoNCE between predicted queries and momentum keys.

        loss = 2 T (ctr(q1, k2) + ctr(q2, k1)),   ctr(q, k) = cross-entropy(q k' / T, same image)

    A sum over the two directions and not their mean; keys of all ranks, without gradient.

    Args:
        spec: of the backbone.
        view: the group of two crops it compares.
        mask: hides patches of the queries' views, if given: not MoCo v3 any more.
        temperature: T.
        out: width of queries and keys.
        hidden: width of the hidden layers of projector and predictor.
        layer: number of the block, from 0, whose tokens it reads, or a fraction of the depth;
            None: the last.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        view: str = "global",
        mask: str | None = None,
        temperature: float = 0.2,
        out: int = 256,
        hidden: int = 4096,
        layer: int | float | None = None,
    ):
        super().__init__()
        self.read = BlockReader(spec, layer)
        self.layer = self.read.block
        self.read_teacher = EmaCopy(self.read)
        layers = self.read.layers
        self.passes = (Pass(view, mask, layers=layers), Pass(view, net="teacher", layers=layers))
        self.temperature = temperature
        self.projector = mlp(spec.dim, hidden, hidden, out, last="plain_batch_norm")
        self.predictor = mlp(out, hidden, out, last="plain_batch_norm")
        self.teacher = EmaCopy(self.projector)

    def check(self, crops: Mapping[str, int], batch: int) -> None:
        super().check(crops, batch)
        need_crops("MoCo v3", self.passes[0].view, crops, 2)
        need_batch("MoCo v3", batch)

    def forward(self, feats: Feats, batch: Batch, step: Step) -> Loss:
        student = self.read(feats[self.passes[0]]).cls.chunk(2)
        teacher = self.read_teacher(feats[self.passes[1]]).cls.chunk(2)
        # One view at a time: batch norm must not mix the two views.
        q1, q2 = (F.normalize(self.predictor(self.projector(x)), dim=-1) for x in student)
        k1, k2 = (F.normalize(self.teacher(x), dim=-1) for x in teacher)
        offset, t = rank() * len(q1), self.temperature
        loss = infonce(q1, gather(k2), t, offset) + infonce(q2, gather(k1), t, offset)
        similarity = (q1.detach() * k2).sum(-1).mean()
        return Loss(2 * t * loss, {"similarity": similarity})
