"""Training stops when a loss is no longer a number, and no such weights are ever saved.

Asking a GPU "is it finite?" before every update would make the host wait for it once per update.
Instead the answer stays on the device and acts there: a non-finite gradient makes the update do
nothing (`found_inf`, the protocol by which torch's gradient scaler has its fused optimisers skip).
The host reads the answer one update later, without a wait, and stops. Before any checkpoint is
written the outstanding answer is read and the weights themselves are looked at, so what is saved is
good whatever the optimiser supports.
"""

import logging
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Float
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor
from torch.nn.utils import get_total_norm

from contramask import distributed
from contramask.callbacks.agreement import Agreement, Table
from contramask.callbacks.checkpoint import Checkpoints
from contramask.checkpoints.files import newest
from contramask.types import UserError

log = logging.getLogger(__name__)

SUM, GRADIENT = "their weighted sum", "the gradient"


class NonFinite(UserError):
    """A loss, a gradient or a weight is infinite or not a number."""


class FiniteLoss(pl.Callback):
    """Stops all ranks after the same update when a loss is non-finite, and names the objective.

    Put it first in the list of callbacks. It reads `losses`, the detached terms by objective, from
    what `training_step` returns, and `loss`, what is minimised.

    An update with a non-finite gradient does not happen on a CPU, nor with a fused optimiser on a
    GPU; with another optimiser on a GPU it may spoil the weights in memory, but never a checkpoint.
    """

    def __init__(self):
        self._agreement: Agreement | None = None
        self._row: Tensor | None = None  # of the update under way, over its micro-batches
        self._gradient: Float[Tensor, ""] | None = None  # 1 if non-finite, else 0
        self._seen = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with a clean slate."""
        self._agreement = Agreement(delayed=pl_module.device.type == "cuda")
        self._row = self._gradient = None
        self._seen = trainer.global_step

    def on_before_optimizer_step(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Make an update with a non-finite gradient do nothing.

        Gradients are equal on all ranks here, so every rank does the same without asking.
        """
        precision = trainer.precision_plugin
        if isinstance(precision, MixedPrecision) and precision.scaler is not None:
            return  # float16: overflowing gradients are the scaler's daily bread, and it skips
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        bad = (~get_total_norm(gradients).isfinite()).float()
        self._gradient = bad
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue]
        elif bad.device.type == "cpu" and bad:
            optimizer.zero_grad(set_to_none=True)  # nothing to apply: the update does nothing

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Note this micro-batch; at the end of an update exchange notes and judge what came in."""
        assert self._agreement is not None, "on_train_start comes first"
        losses = {**outputs.get("losses", {}), SUM: outputs["loss"]}
        row = _kind(torch.stack([loss.detach().float() for loss in losses.values()]))
        self._row = row if self._row is None else torch.maximum(self._row, row)
        if trainer.global_step == self._seen:
            return
        gradient = row.new_zeros(()) if self._gradient is None else self._gradient
        row = torch.cat([self._row, gradient[None]])
        table = self._agreement.put(row, step=trainer.global_step, names=(*losses, GRADIENT))
        self._row = self._gradient = None
        self._seen = trainer.global_step
        self._judge(trainer, table)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to save what is not finite. Lightning calls this on all ranks before a save."""
        if self._agreement is not None:
            self._judge(trainer, self._agreement.flush())
        weights = [
            p.detach() for p in pl_module.parameters() if p.is_floating_point() and p.numel()
        ]
        # Infinity may have a meaning in a buffer (a mask of logits); NaN has none.
        nans = [b.isnan().any() for b in pl_module.buffers() if b.is_floating_point()]
        bad = ~get_total_norm(weights, float("inf")).isfinite()
        bad = torch.stack([bad, *(nan.to(bad.device) for nan in nans)]).any()
        ranks = distributed.gather(bad[None].int()).nonzero().flatten().tolist()
        if ranks:
            raise NonFinite(
                f"weights or statistics are not finite after update {trainer.global_step}"
                f"{_on(ranks)}, so no checkpoint was written; {_advice(trainer)}"
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge the last update."""
        if self._agreement is not None:
            self._judge(trainer, self._agreement.flush())

    def _judge(self, trainer: pl.Trainer, table: Table | None) -> None:
        """Raises NonFinite if a row of the table says so."""
        if table is None or not table.rows.any():
            return
        told = {
            name: f"{('', 'infinite', 'NaN')[int(kinds.max())]}{_on(kinds.nonzero())}"
            for name, kinds in zip(table.names, table.rows.T, strict=True)
            if kinds.any()
        }
        gradient = told.pop(GRADIENT, None)
        if len(told) > 1:
            told.pop(SUM, None)  # it only repeats what its terms say
        if told:
            what = "loss of " + ", ".join(f"{name!r} is {kind}" for name, kind in told.items())
        else:
            what = "every loss is finite, but the gradient is not"
        log.debug("non-finite at update %d: %s; gradient: %s", table.step, told, gradient)
        raise NonFinite(f"update {table.step}: {what}; {_advice(trainer)}")


def _kind(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """0: finite, 1: infinite, 2: NaN."""
    return values.isinf() + 2.0 * values.isnan()


def _on(ranks: Tensor | list[int]) -> str:
    """Which ranks, if there are several to tell apart."""
    if distributed.world() == 1:
        return ""
    numbers = torch.as_tensor(ranks).flatten().tolist()
    return f" on rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _advice(trainer: pl.Trainer) -> str:
    folders = [
        c.folder for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoints) and c.folder
    ]
    good = newest(folders[0]) if folders else None
    return (
        (f"the last good checkpoint is {good}" if good else "there is no good checkpoint yet")
        + "; going on from there repeats this, for data and draws are functions of the step: try a "
        "smaller model.optim.lr, a longer warm-up, or model.optim.clip, in a new run"
    )
