"""Fine-tuning: all weights of a pretrained backbone learn to name classes."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contramask.models.backbone import Backbone
from contramask.models.classifier import Classifier, Pool, tunable
from contramask.models.ema import EmaCopy
from contramask.optim import Optim, Rule
from contramask.schedule import Schedule, at
from contramask.training.clocked import Clocked
from contramask.training.dropout import seed_layers
from contramask.training.plan import describe
from contramask.types import Batch, UserError

# Biases, norms, scales, positions and the class token are not decayed (MAE, BEiT, SimMIM, iBOT).
UNDECAYED = [Rule("pos_embed|cls_token", decay=0.0), Rule(ndim=1, decay=0.0)]


class FineTuning(Clocked):
    """Minimise the cross-entropy with the targets of `LabelledShards`.

    Layer-wise decay of the learning rate goes by the names in the classifier: block i of L has the
    factor `optim.layer_decay` ** (L - i), what comes before the blocks ** (L + 1), the last norm
    and the head 1 (MAE, arXiv:2111.06377; BEiT, arXiv:2106.08254).

    Attributes:
        classifier: what is trained.
        average: its moving average, if `ema` is set.

    Args:
        backbone: pretrained; it is copied, see `models.classifier.tunable`.
        classes: how many.
        size: pixels a side of the images.
        pool: how tokens become one vector, see `Classifier`.
        drop_path: the rate of the last block, growing from 0 in the first.
        head_std: standard deviation of the new head's weights.
        freeze_patch_embed: keep the patch projection as it is.
        optim: optimiser, rates and parameter groups. None: MAE's for ViT-B without layer-wise
            decay.
        ema: momentum of a moving average of all weights, which is scored too; None: none.
        seed: of the head, dropout and drop path.
        compile: run the classifier through torch.compile.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        *,
        size: int,
        pool: Pool = "mean",
        drop_path: float = 0.1,
        head_std: float = 2e-5,
        freeze_patch_embed: bool = False,
        optim: Optim | None = None,
        ema: float | Schedule | None = None,
        seed: int = 0,
        compile: bool = False,
    ):
        default = Optim(
            lr=Schedule(peak=5e-4, end=1e-6, warmup=0.05), betas=(0.9, 0.999), rules=UNDECAYED
        )
        super().__init__(optim or default, seed=seed)
        if isinstance(ema, int | float) and not 0 <= ema < 1:
            raise UserError(
                f"fine-tuning: ema is {ema}; it is a momentum in [0, 1), such as 0.9999, a "
                "schedule, or null for no average; set model.ema"
            )
        tuned = tunable(
            backbone, size=size, drop_path=drop_path, freeze_patch_embed=freeze_patch_embed
        )
        self.size, self.ema = size, ema
        self.classifier = Classifier(tuned, classes, pool=pool)
        self.classifier.initialise(std=head_std, seed=seed)
        self.average = None if ema is None else EmaCopy(self.classifier)
        self._compile = compile
        self._forward: list[Callable[[Tensor], Tensor]] = []  # in a list: no module of its own

    @property
    def backbone(self) -> Backbone:
        """The part that was pretrained."""
        return self.classifier.backbone

    @property
    def nets(self) -> dict[str, nn.Module]:
        """What is scored, by the prefix of its numbers."""
        found: dict[str, nn.Module] = {"": self.classifier}
        return found if self.average is None else {**found, "ema_": self.average}

    def trained(self) -> Iterable[tuple[str, nn.Parameter]]:
        return self.classifier.named_parameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        step = self.place(batch)
        seed_layers(step, "classify", self.device)
        logits: Tensor = self._network()(batch["views"]["train"][0])
        loss = F.cross_entropy(logits.float(), batch["target"])
        if self.due(step.index):
            self.ledger.add({"train/loss": loss})
            if self.ema is not None:
                self.ledger.add({"optim/ema_momentum": at(self.ema, step.progress)})
        return {"loss": loss, "losses": {"classify": loss.detach()}}

    def _network(self) -> Callable[[Tensor], Tensor]:
        # The eager module stays as it is, for analyses and scores.
        if not self._forward:
            self._forward.append(
                torch.compile(self.classifier) if self._compile else self.classifier
            )
        return self._forward[0]

    def moved(self, progress: float) -> None:
        if self.average is not None and self.ema is not None:
            self.average.update(at(self.ema, progress))

    def check(self, batch: Batch) -> None:
        side = batch["views"]["train"].shape[-1]
        if side != self.size:
            raise UserError(
                f"images have {side} pixels a side, the backbone was made ready for {self.size}; "
                "set data.images.size to that"
            )

    def describe(self) -> str:
        """How many parameters there are and what they are trained for, in a few lines."""
        lines = [describe(self.classifier.parameters(), (), {})]
        how = "mean of patches" if self.classifier.pool == "mean" else "class token"
        return "\n".join([*lines, f"{self.classifier.classes} classes from the {how}"])
