"""Spread features over the sphere. Sablayrolles et al., 2018; used by DINOv2 beside iBOT.

arXiv:1806.03198, eq. 3; arXiv:2304.07193, section 4.
"""

from collections.abc import Mapping

from contramask.functional.distil import koleo
from contramask.objectives.objective import Feats, Objective, need_batch
from contramask.types import Batch, Loss, Pass, Spec, Step


class KoLeo(Objective):
    """Kozachenko-Leonenko estimate of the entropy of class tokens, with the sign of a loss.

        loss = sum over crops of -mean_i log(distance of image i to its nearest in the batch)

    The batch is that of one rank: the value depends on how the global batch is spread. Its weight
    in DINOv2 is 0.1.

    Args:
        spec: of the backbone.
        view: the group of crops it reads.
        mask: of the pass it reads; give iBOT's to share its forward.
    """

    def __init__(self, spec: Spec, *, view: str = "global", mask: str | None = None):
        super().__init__()
        self.passes = (Pass(view, mask),)

    def check(self, crops: Mapping[str, int], batch: int) -> None:
        super().check(crops, batch)
        need_batch("KoLeo", batch)

    def forward(self, feats: Feats, batch: Batch, step: Step) -> Loss:
        crops = feats[self.passes[0]].cls.split(len(batch["label"]))
        return Loss(sum((koleo(x) for x in crops[1:]), start=koleo(crops[0])), {})
