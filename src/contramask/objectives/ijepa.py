"""Predict what a teacher makes of hidden blocks, in its space. Assran et al., 2023: I-JEPA.

arXiv:2301.08243, section 3.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from contramask.functional.patches import blacken
from contramask.models.predictor import Predictor, places
from contramask.objectives.objective import Feats, Objective
from contramask.types import Batch, Loss, Pass, Spec, Step


class IJEPA(Objective):
    """Smooth L1 between predicted and teacher's tokens of target blocks.

        loss = mean over blocks, their patches and channels of smooth_l1(prediction - target)

    The student sees the context alone, the teacher the whole image. The paper writes a squared
    distance; the authors' code has smooth L1 with its bend at 1, and normalises the targets.

    Args:
        spec: of the backbone.
        mask: a mask that drops patches and has target blocks of one size.
        view: the group of crops it looks at.
        dim: width of the predictor.
        depth: its blocks; 12, and 6 for ViT-B in the paper.
        heads: its attention heads; the authors' code takes the backbone's.
        normalise: targets have mean 0 and variance 1 over their channels.
        beta: where smooth L1 turns from a square to a line.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        mask: str,
        view: str = "mild",
        dim: int = 384,
        depth: int = 12,
        heads: int = 12,
        normalise: bool = True,
        beta: float = 1.0,
    ):
        super().__init__()
        self.passes = (Pass(view, mask), Pass(view, net="teacher"))
        self.spec, self.normalise, self.beta = spec, normalise, beta
        self.predictor = Predictor(spec, dim=dim, depth=depth, heads=heads)

    def target(
        self, patch: Float[Tensor, "B N D"], where: Int[Tensor, "B T M"]
    ) -> Float[Tensor, "B T M D"]:
        """The teacher's tokens at the places of the target blocks."""
        wide = patch.float()
        if self.normalise:
            wide = F.layer_norm(wide, wide.shape[-1:])
        return wide[torch.arange(len(wide), device=wide.device)[:, None, None], where]

    def forward(self, feats: Feats, batch: Batch, step: Step) -> Loss:
        student, teacher = (feats[p] for p in self.passes)
        assert student.mask is not None
        where = places(student.mask.targets)
        prediction = self.predictor(student, where).float()
        target = self.target(teacher.patch.detach(), where)
        loss = F.smooth_l1_loss(prediction, target, beta=self.beta)
        # Collapsed when all tokens are one: then this is 0.
        spread = target.flatten(0, 2).std(0).mean()
        return Loss(loss, {"spread": spread})

    def picture(self, feats: Feats, batch: Batch, step: Step) -> dict[str, Tensor]:
        mask = feats[self.passes[0]].mask
        assert mask is not None
        image = batch["views"][self.passes[0].view].flatten(0, 1)
        patch, blocks = self.spec.patch, mask.targets.unbind(1)
        asked = {f"target {i}": blacken(image, ~block, patch) for i, block in enumerate(blocks)}
        return {"image": image, "context": blacken(image, mask.hidden, patch), **asked}
