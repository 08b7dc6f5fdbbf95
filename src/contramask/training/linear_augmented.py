"""Linear probing on augmented views of a frozen backbone, under `Trainer.fit`, then `test`."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from contramask.models.backbone import Backbone
from contramask.probes.extraction import gather_rows
from contramask.probes.features import CLEAN, Feature, feature_set
from contramask.probes.linear import LinearProbe, LinearRecipe
from contramask.training.augmented_images import VIEW
from contramask.training.head_scores import HeadScores, held_out
from contramask.types import Batch, UserError, fold


class LinearAugmented(pl.LightningModule):
    """Heads of several features and rates that all learn from one forward of augmented views.

    `trainer.fit(module, AugmentedImages(data, ...))` trains them, for a number of steps that the
    module sets: epochs x images of train // (batch x ranks x accumulation). `trainer.test` then
    scores them. Where there is more than one head, a part of train is held out by the names of its
    images, the same on all ranks and in all epochs: it is not learned from, and the head that is
    best on it is the one that is scored on val.

    Rows of all ranks are brought together before the heads learn, so every rank holds the same
    heads. A checkpoint holds the heads and what their optimiser gathered, not the backbone; it
    goes on bitwise, and only where all that the heads hang on is the same, see `settings`.

    Attributes:
        probes: the heads of each feature.
        result: after `test`, `values` (`top1`, `top5`: fractions; `rate`, of 256 images;
            `images` of val), `feature`, `sweep` (accuracy of each head on the part held out) and
            `training` (steps, images of a batch, steps that had no row to learn from).
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        recipe: LinearRecipe,
        features: Sequence[Feature],
        classes: int,
        samples: int,
        batch_size: int,
        digest: str = "",
        images: str = "",
    ):
        """Heads at their start.

        Args:
            backbone: loaded; it is not changed.
            recipe: of the heads. Its `batch` is that of the protocol; the one in use follows from
                `batch_size`, and rates are scaled to it.
            features: what the heads read.
            classes: C.
            samples: images of train.
            batch_size: images of a micro-batch on one rank.
            digest: a checksum of the backbone, by which a checkpoint is known.
            images: how they become views, in words; a checkpoint is known by it too.
        """
        super().__init__()
        self.backbone = backbone.requires_grad_(requires_grad=False).eval()
        self.recipe, self.features = recipe, tuple(features)
        self.classes, self.samples, self.batch_size = classes, samples, batch_size
        self.widths = [f.width(backbone.spec) for f in self.features]
        self.probes = nn.ModuleList(
            LinearProbe(width, classes, recipe=recipe, resumable=True) for width in self.widths
        )
        # Lightning counts the steps of an optimiser, and DDP wants a parameter with a gradient.
        self.clock = nn.Parameter(torch.zeros(()))
        # All else is equal on all ranks; DDP would send it from the first one at every step.
        everything = (*self.named_parameters(), *self.named_buffers())
        self._ddp_params_and_buffers_to_ignore = [n for n, _ in everything if n != "clock"]
        self.strict_loading = False
        network = (digest, backbone.spec, sorted(backbone.config.items()))
        self._about = (network, images, recipe, self.features, classes, samples)
        self.global_batch = self.steps = self.idle = 0
        self._rows: list[list[Tensor]] = [[] for _ in self.features]
        self._labels: list[Tensor] = []
        self.result: dict[str, Any] = {}

    @property
    def several(self) -> bool:
        """Whether there is a head to choose."""
        return len(self.features) * len(self.recipe.rates) > 1

    @property
    def heads(self) -> list[LinearProbe]:
        """The heads of each feature, with their type."""
        return [p for p in self.probes if isinstance(p, LinearProbe)]

    def settings(self, trainer: pl.Trainer) -> str:
        """A checksum of all that heads trained by it hang on, but for the shards."""
        about = (*self._about, self._batch_of(trainer), trainer.precision)
        return f"{fold(*map(repr, about)):016x}"

    def _batch_of(self, trainer: pl.Trainer) -> int:
        """Images of a step, over all ranks."""
        return self.batch_size * trainer.world_size * trainer.accumulate_grad_batches

    def setup(self, stage: str) -> None:
        trainer = self.trainer
        self.global_batch = self._batch_of(trainer)
        self.steps = self.recipe.epochs * self.samples // self.global_batch
        if self.steps < 1:
            raise UserError(
                f"linear probe: {self.recipe.epochs} epochs of {self.samples} images are no whole "
                f"batch of {self.global_batch}; set data.batch_size or recipe.epochs"
            )
        for probe in self.heads:
            probe.steps = self.steps
        if stage == "fit":
            trainer.fit_loop.epoch_loop.max_steps = self.steps

    def train(self, mode: bool = True) -> "LinearAugmented":
        """The backbone stays in eval mode whatever the trainer wants."""
        super().train(mode)
        self.backbone.eval()
        return self

    # ---- learning ---------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.clock], lr=0.0)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if batch["position"] // self.global_batch != self.global_step:
            raise RuntimeError(
                f"the stream is at image {batch['position']}, training at step {self.global_step} "
                f"of {self.global_batch}: the loader did not start where the checkpoint stopped"
            )
        used = (batch["label"] >= 0) & ~self._held(batch)
        self._labels.append(batch["label"][used])
        if used.any():
            with torch.no_grad():
                found = feature_set(self.backbone, batch["views"][VIEW][0][used], self.features)
            for rows, x in zip(self._rows, found, strict=True):
                rows.append(x)
        return 0 * self.clock

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """The last micro-batch of a step is read; then the heads learn from all of them."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        labels = gather_rows(torch.cat(self._labels))
        shown: int = self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        losses = []
        enough = len(labels) > int(self.recipe.batch_norm)  # one row has no statistics
        self.idle += not enough
        for probe, rows, width in zip(self.heads, self._rows, self.widths, strict=True):
            x = gather_rows(torch.cat([torch.empty((0, width), device=self.device), *rows]))
            if not enough:
                probe.skip()
                continue
            probe.learn(x, labels, batch=self.global_batch)
            if shown and (self.global_step + 1) % shown == 0:
                losses.append(probe.tally(x, labels)[1] / len(labels))
        self._rows, self._labels = [[] for _ in self.features], []
        if losses:
            loss = torch.cat(losses).nan_to_num(torch.inf).min()  # of the best head
            self.log("train/loss", loss, batch_size=1)

    def _held(self, batch: Batch) -> Bool[Tensor, " B"]:
        """Which images heads are chosen on."""
        if not self.several:
            return torch.zeros_like(batch["label"], dtype=torch.bool)
        recipe, keys = self.recipe, batch.get("keys")
        assert keys is not None, "images are held out by their names, which the batch lacks"
        held = [held_out(key, recipe.holdout, seed=recipe.seed) for key in keys]
        return torch.tensor(held, device=batch["label"].device)

    # ---- checkpoints ------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state: Mapping[str, Any] = checkpoint["state_dict"]
        checkpoint["state_dict"] = {
            name: value for name, value in state.items() if not name.startswith("backbone.")
        }
        first = self.heads[0]  # all have made the same steps
        checkpoint["linear"] = {
            "settings": self.settings(self.trainer),
            "step": first.step,
            "updates": first.updates,
            "idle": self.idle,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        known: dict[str, Any] = checkpoint.get("linear", {})
        if known.get("settings") != self.settings(self.trainer):
            raise UserError(
                "linear probe: the checkpoint is of another backbone, recipe, feature, precision, "
                "batch over all ranks or other images; put these back, or begin anew in another "
                "folder"
            )
        self.idle = known["idle"]
        for probe in self.heads:
            probe.step, probe.updates = known["step"], known["updates"]

    # ---- scoring ----------------------------------------------------------------------------

    def on_test_epoch_start(self) -> None:
        self._scores = [HeadScores(self.heads) for _ in range(1 + self.several)]

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        used = batch["label"] >= 0
        if self.several and dataloader_idx == 0:
            used &= self._held(batch)
        if used.any():
            found = feature_set(self.backbone, batch["views"][CLEAN][0][used], self.features)
            with torch.autocast(self.device.type, enabled=False):
                self._scores[dataloader_idx].add(found, batch["label"][used])

    def on_test_epoch_end(self) -> None:
        *held, val = [scores.table(self.device) for scores in self._scores]
        del self._scores
        best = [*held, val][0].best()  # of a single head val tells whether it diverged
        rates = self.recipe.rates
        named = [(f, rate) for f in self.features for rate in rates]
        top1, top5 = val.accuracy(best)
        values: dict[str, float] = {"top1": top1}
        if self.classes > 5:  # of five classes all are among the first five
            values["top5"] = top5
        values |= {"rate": named[best][1], "images": val.images}
        self.result = {
            "values": values,
            "feature": str(named[best][0]),
            "sweep": [
                {"feature": str(f), "rate": rate, "top1": held[0].accuracy(i)[0]}
                for i, (f, rate) in enumerate(named if held else [])
            ],
            "training": {"steps": self.steps, "batch": self.global_batch, "idle": self.idle},
        }
        self.log_dict({f"linear/{n}": float(v) for n, v in values.items()}, sync_dist=True)
