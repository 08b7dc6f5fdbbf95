"""Tell apart images from what a decoder makes of a few patches. Huang et al., 2022: CMAE.

arXiv:2207.13532. The method is this contrast and MAE's reconstruction of the same masked pass:
`contramask.objectives.mae.MAE` with equal mask and view is the other half, and the two share one
forward.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contramask.distributed import gather, rank
from contramask.functional.contrast import infonce
from contramask.models.decoder import TransformerDecoder
from contramask.models.ema import EmaCopy
from contramask.objectives.objective import Feats, Objective, need_batch
from contramask.types import Batch, Loss, Pass, Spec, Step, Tokens, UserError


class CMAEContrast(Objective):
    """InfoNCE, one way, from a masked view to a teacher's of the whole other view.

        q = predictor(projector(mean of the decoder's tokens))
        k = teacher's projector(mean of the teacher's patch tokens)
        loss = 2 T cross-entropy(q k' / T, same image)

    Keys of all ranks, without gradient. With several crops, crop v meets crop v, and the loss is
    the mean over crops.

    Args:
        spec: of the backbone.
        mask: a mask that drops patches of the student's view.
        view: the group of crops the student sees.
        target: the group of as many crops the teacher sees, unmasked.
        temperature: T.
        out: width of queries and keys.
        hidden: width of the hidden layers of projector and predictor.
        dim: width of the decoder.
        depth: its blocks.
        heads: its attention heads.
        final_norm: the teacher's tokens are read after its final norm; the authors' code reads the
            last block's output, before it.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        mask: str,
        view: str = "mild",
        target: str = "shifted",
        temperature: float = 0.07,
        out: int = 256,
        hidden: int = 1536,
        dim: int = 512,
        depth: int = 2,
        heads: int = 16,
        final_norm: bool = False,
    ):
        super().__init__()
        self.last = None if final_norm else spec.depth - 1
        layers = () if self.last is None else (self.last,)
        self.passes = (Pass(view, mask), Pass(target, net="teacher", layers=layers))
        self.temperature = temperature
        # As wide as the teacher's tokens, which the same projector reads: 768 for ViT-B/16, where
        # the authors' decoder has one output for each of the 3 x 16 x 16 numbers of a patch.
        self.decoder = TransformerDecoder(spec, spec.dim, dim=dim, depth=depth, heads=heads)
        self.projector = _head(spec.dim, hidden, out)
        self.predictor = _head(out, hidden, out)
        self.teacher = EmaCopy(self.projector)

    def check(self, crops: Mapping[str, int], batch: int) -> None:
        super().check(crops, batch)
        view, target = (p.view for p in self.passes)
        if crops[view] != crops[target]:
            raise UserError(
                f"CMAE compares crops one by one: view {view!r} has {crops[view]}, view "
                f"{target!r} has {crops[target]}; set data.views.{target}.number"
            )
        need_batch("CMAE", batch)

    def forward(self, feats: Feats, batch: Batch, step: Step) -> Loss:
        student, teacher = (feats[p] for p in self.passes)
        crops = len(batch["views"][self.passes[0].view])
        seen = self.decoder(student).mean(1).chunk(crops)  # (B, D) each
        shown = self._patches(teacher).mean(1).chunk(crops)
        # One crop at a time: batch norm must not mix them.
        queries = [F.normalize(self.predictor(self.projector(x)), dim=-1) for x in seen]
        keys = [F.normalize(self.teacher(x), dim=-1) for x in shown]
        offset, t = rank() * len(queries[0]), self.temperature
        pairs = list(zip(queries, keys, strict=True))
        loss = torch.stack([infonce(q, gather(k), t, offset) for q, k in pairs]).mean()
        similarity = torch.stack([(q.detach() * k).sum(-1).mean() for q, k in pairs]).mean()
        return Loss(2 * t * loss, {"similarity": similarity})

    def _patches(self, tokens: Tokens) -> Tensor:
        """The teacher's patch tokens, (VB, N, D)."""
        if self.last is None:
            return tokens.patch
        return tokens.layers[self.last][:, tokens.prefix.shape[1] :]


def _head(width: int, hidden: int, out: int) -> nn.Sequential:
    """Linear, batch norm, ReLU, Linear; the first has a bias, the norm an epsilon of 1e-6."""
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.BatchNorm1d(hidden, eps=1e-6),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, out, bias=False),
    )
