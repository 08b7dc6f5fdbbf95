"""Predict how a momentum teacher sorts another crop of the image. Caron et al., 2021: DINO.

arXiv:2104.14294, algorithm 1 and section 3.1.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from contramask.distributed import mean
from contramask.functional.distil import centred, cross_view
from contramask.models.ema import EmaCopy
from contramask.models.heads import PrototypeHead
from contramask.objectives.objective import Feats, Objective, need_crops
from contramask.schedule import Schedule, at
from contramask.types import Batch, Loss, Pass, Spec, Step


class DINO(Objective):
    """Cross-entropy between the teacher's and the student's prototypes, over pairs of crops.

        loss = mean over (g, v), v != g, of CE(softmax((t_g - c) / T_t), softmax(s_v / T_s))
        c <- m c + (1 - m) mean t        after it was used, over all ranks

    g runs over the two global crops, v over them and the local ones. At the start the loss is ln K;
    if it stays there every image has the same uniform code, if it falls to 0 they all have the same
    prototype.

    Args:
        spec: of the backbone.
        view: the group of two global crops.
        local: the group of small crops, which the student alone sees; None: no multi-crop.
        mask: hides patches of the student's global crops, if given: not DINO any more.
        out: number of prototypes, K.
        hidden: width of the head's hidden layers.
        bottleneck: width before the prototypes.
        layers: of the head's MLP.
        norm_last_layer: prototypes keep length 1; the authors do so for ViT-B, not for ViT-S.
        temperature: T_s.
        teacher_temperature: T_t; 0.04, or to 0.07 in 30 epochs, moving once an epoch (`stairs`).
        centre_momentum: m.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        view: str = "global",
        local: str | None = "local",
        mask: str | None = None,
        out: int = 65536,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        norm_last_layer: bool = True,
        temperature: float = 0.1,
        teacher_temperature: float | Schedule = 0.04,
        centre_momentum: float = 0.9,
    ):
        super().__init__()
        small = () if local is None else (Pass(local),)
        self.passes = (Pass(view, mask), Pass(view, net="teacher"), *small)
        self.temperature, self.teacher_temperature = temperature, teacher_temperature
        self.centre_momentum = centre_momentum
        sizes = {"hidden": hidden, "bottleneck": bottleneck, "layers": layers}
        self.head = PrototypeHead(spec.dim, out, **sizes, fixed_length=norm_last_layer)
        self.teacher = EmaCopy(self.head)
        self.register_buffer("centre", torch.zeros(out))

    def check(self, crops: Mapping[str, int], batch: int) -> None:
        super().check(crops, batch)
        need_crops("DINO", self.passes[0].view, crops, 2)

    def forward(self, feats: Feats, batch: Batch, step: Step) -> Loss:
        images, centre = len(batch["label"]), self.get_buffer("centre")
        student, teacher, *local = (feats[p].cls for p in self.passes)
        scores = self.head(torch.cat([student, *local])).unflatten(0, (-1, images))  # (V, B, K)
        taught = self.teacher(teacher).unflatten(0, (2, images))  # (2, B, K)
        targets = centred(taught, centre, at(self.teacher_temperature, step.progress))
        loss = cross_view(scores, targets, self.temperature)
        now = mean(taught.flatten(0, 1).to(centre.dtype).mean(0))
        state = {"centre": centre.lerp(now, 1 - self.centre_momentum)}
        return Loss(loss, entropies(targets.flatten(0, 1)), state)


def entropies(targets: Float[Tensor, "M K"]) -> dict[str, Tensor]:
    """Of the teacher's codes, in nats: ln K of both is uniform collapse, 0 of the second the other.

    `target_entropy` is the mean over images, `code_entropy` that of the mean code.
    """
    rows = torch.special.entr(targets).sum(-1)
    return {
        "target_entropy": rows.mean(),
        "code_entropy": torch.special.entr(targets.mean(0)).sum(),
    }
