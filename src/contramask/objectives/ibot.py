"""DINO, and the same for hidden patches: image BERT with an online tokenizer. Zhou et al., 2021.

arXiv:2111.07832, eq. 2 and 3. With separate heads, Sinkhorn-Knopp or masked centres, and `KoLeo`
beside it, it is the objective of DINOv2 (arXiv:2304.07193).
"""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from contramask.distributed import largest, mean, total
from contramask.errors import need_one_of
from contramask.functional.distil import centred, cross_entropy, cross_view, sinkhorn
from contramask.models.ema import EmaCopy
from contramask.models.heads import Sharing, TokenHeads
from contramask.objectives.dino import entropies
from contramask.objectives.objective import Feats, Objective, need_crops, need_fill
from contramask.schedule import Schedule, at
from contramask.types import Batch, Loss, Pass, Spec, Step

Targets = Literal["centre", "sinkhorn"]
Centred = Literal["all", "masked"]
WHERE = "model.objectives.NAME.init_args"


class IBOT(Objective):
    """Prototypes of the class token across crops, and of hidden patches within a crop.

        cls    mean over (g, v), v != g, of CE(teacher of g, student of v)           as in DINO
        patch  mean over the global crops, whole ones included, of
               sum over hidden patches of CE(teacher, student) / max(their number, 1)
        loss = cls_weight cls + patch_weight patch

    Args:
        spec: of the backbone.
        mask: a mask with a fill; the student's global crops alone are masked.
        view: the group of two global crops.
        local: the group of small crops; None: no multi-crop.
        out: prototypes of the class token.
        patch_out: prototypes of patches; None: `out`.
        hidden: width of the heads' hidden layers.
        bottleneck: width before the prototypes.
        sharing: `shared`, one head for both (released iBOT models, DINOv2); `split`, one MLP with
            two sets of prototypes (default of iBOT's code); `separate` (DINOv2's long runs).
        teacher_shares: of a `split` head the teacher keeps one set of prototypes, which starts as
            the student's for patches and then follows that for class tokens: what iBOT's code does
            by default (student not shared, teacher shared).
        norm_last_layer: prototypes keep length 1.
        targets: `centre` or `sinkhorn` (Sinkhorn-Knopp, of both crops together).
        patch_centre: the patches that move the centre: `all` (iBOT) or the `masked` (DINOv2).
        temperature: of the student.
        teacher_temperature: for class tokens.
        patch_temperature: for patches; None: as for class tokens.
        centre_momentum: of the centre of class tokens.
        patch_centre_momentum: of that of patches; None: as for class tokens.
        cls_weight: of the first term.
        patch_weight: of the second.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        mask: str,
        view: str = "global",
        local: str | None = "local",
        out: int = 8192,
        patch_out: int | None = None,
        hidden: int = 2048,
        bottleneck: int = 256,
        sharing: Sharing = "shared",
        teacher_shares: bool = False,
        norm_last_layer: bool = True,
        targets: Targets = "centre",
        patch_centre: Centred = "all",
        temperature: float = 0.1,
        teacher_temperature: float | Schedule = 0.04,
        patch_temperature: float | Schedule | None = None,
        centre_momentum: float = 0.9,
        patch_centre_momentum: float | None = None,
        cls_weight: float = 1.0,
        patch_weight: float = 1.0,
    ):
        super().__init__()
        need_one_of(targets, Targets, "iBOT: targets", f"{WHERE}.targets")
        need_one_of(patch_centre, Centred, "iBOT: patch_centre", f"{WHERE}.patch_centre")
        small = () if local is None else (Pass(local),)
        self.passes = (Pass(view, mask), Pass(view, net="teacher"), *small)
        self.targets, self.patch_centre = targets, patch_centre
        self.temperature, self.cls_weight, self.patch_weight = temperature, cls_weight, patch_weight
        patches = centre_momentum if patch_centre_momentum is None else patch_centre_momentum
        self.centre_momenta = {"centre": centre_momentum, "patch_centre_": patches}
        self.teacher_temperature = teacher_temperature
        self.patch_temperature = patch_temperature or teacher_temperature
        sizes = {"hidden": hidden, "bottleneck": bottleneck, "fixed_length": norm_last_layer}
        heads = TokenHeads(spec.dim, out, patch_out, sharing=sharing, **sizes)
        self._add(heads, teacher_shares=teacher_shares)
        self.register_buffer("centre", torch.zeros(out))
        self.register_buffer("patch_centre_", torch.zeros(patch_out or out))

    def _add(self, heads: TokenHeads, *, teacher_shares: bool) -> None:
        self.heads, self.teacher = heads, EmaCopy(heads)
        self.teacher_kind: Literal["cls", "patch"] = "cls" if teacher_shares else "patch"
        if teacher_shares:
            heads.lend(self.teacher.module)

    def check(self, crops: Mapping[str, int], batch: int) -> None:
        super().check(crops, batch)
        need_crops("iBOT", self.passes[0].view, crops, 2)

    def forward(self, feats: Feats, batch: Batch, step: Step) -> Loss:
        images = len(batch["label"])
        student, teacher, *local = (feats[p] for p in self.passes)
        need_fill("iBOT", student, self.passes[0])
        scores = self.heads(torch.cat([student.cls, *(t.cls for t in local)]), "cls")
        taught = self.teacher(teacher.cls, "cls")
        targets, centre = self._targets(
            taught, "centre", at(self.teacher_temperature, step.progress)
        )
        crops = scores.unflatten(0, (-1, images)), targets.unflatten(0, (2, images))
        cls = cross_view(*crops, self.temperature)
        assert student.mask is not None
        patch, patch_centre = self._patches(student.patch, teacher.patch, student.mask.hidden, step)
        logs = {"cls": cls.detach(), "patch": patch.detach(), **entropies(targets)}
        loss = self.cls_weight * cls + self.patch_weight * patch
        return Loss(loss, logs, {"centre": centre, "patch_centre_": patch_centre})

    def _patches(
        self,
        student: Float[Tensor, "M N D"],
        teacher: Float[Tensor, "M N D"],
        hidden: Bool[Tensor, "M N"],
        step: Step,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " K"]]:
        """The second term, and the centre of patches after it."""
        temperature = at(self.patch_temperature, step.progress)
        if self.patch_centre == "all" and self.targets == "centre":
            every = self.teacher(teacher, self.teacher_kind)  # (M, N, K)
            taught, seen = every[hidden], every.flatten(0, 1)
        else:
            taught = seen = self.teacher(teacher[hidden], self.teacher_kind)
        targets, centre = self._targets(taught, "patch_centre_", temperature, seen)
        errors = cross_entropy(self.heads(student[hidden], "patch"), targets, self.temperature)
        each = (1 / hidden.sum(1).clamp(min=1))[:, None].expand_as(hidden)[hidden]
        return (errors * each).sum() / len(hidden), centre

    def _targets(
        self,
        taught: Float[Tensor, "M K"],
        buffer: str,
        temperature: float,
        seen: Float[Tensor, "L K"] | None = None,
    ) -> tuple[Float[Tensor, "M K"], Float[Tensor, " K"]]:
        """The teacher's codes, and its centre after it was used."""
        centre = self.get_buffer(buffer)
        if self.targets == "sinkhorn":
            return sinkhorn(taught, temperature, total=total, largest=largest), centre
        seen = taught if seen is None else seen
        # A rank without a hidden patch has nothing to say; ranks count alike, as in DINOv2.
        now = mean(seen.to(centre.dtype).mean(0) if len(seen) else centre)
        moved = centre.lerp(now, 1 - self.centre_momenta[buffer])
        return centred(taught, centre, temperature), moved
