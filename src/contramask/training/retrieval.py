"""Retrieval evaluation of a frozen backbone, under `Trainer.validate`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.progress import Progress

from contramask.distributed import gather, rank
from contramask.models.backbone import Backbone
from contramask.models.digest import digest_of
from contramask.probes.evaluation import CleanData
from contramask.probes.features import CLS, Feature, frozen
from contramask.probes.parts import Parts
from contramask.probes.retrieval import Reader, Stock
from contramask.probes.retrieval_images import COPIES_HELD
from contramask.probes.retrieval_tasks import LOADERS, Loaded, Retrieval, RetrievalRecipe, told
from contramask.training.precision import in_words
from contramask.types import Batch, UserError


class RetrievalImages(pl.LightningDataModule):
    """The clean images that a recipe reads, a loader for each purpose.

    Args:
        data: the data module of pretraining, or one like it.
        recipe: of the evaluation.
        limit: the most images of train and of val, over all ranks; None: all.
        queries: images of val whose patches and copies are looked for; always the same ones.
        distractors: images of train among which copies are looked for; 0: none.

    Raises:
        UserError: for numbers that cannot be.
    """

    def __init__(
        self,
        data: CleanData,
        recipe: RetrievalRecipe,
        *,
        limit: int | None = None,
        queries: int = 300,
        distractors: int = 10_000,
    ):
        super().__init__()
        if queries < 1 or distractors < 0:
            raise UserError(
                f"retrieval: queries is {queries} and distractors {distractors}; queries are 1 or "
                "more, distractors 0 or more; set --queries and --distractors"
            )
        self.data, self.recipe = data, recipe
        own = {"originals": queries, "distractors": distractors}
        self.limits = {
            name: min((n for n in (own.get(name), limit) if n is not None), default=None)
            for name in recipe.loaders
        }

    def val_dataloader(self) -> list[Any]:
        return [self._loader(name) for name in self.recipe.loaders]

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Batch:
        return self.data.to_device(batch, device)

    def _loader(self, name: Loaded) -> Any:
        if self.limits[name] == 0:  # which data modules need not know
            return _Nothing()
        return self.data.clean_dataloader(LOADERS[name], self.limits[name])


class _Nothing:
    """A loader without a batch; Lightning warns of those that say so beforehand."""

    def __iter__(self) -> Iterator[Batch]:
        return iter(())


class RetrievalEvaluation(pl.LightningModule):
    """Patches found again under transformations, images of a class, originals of copies.

    Runs under `Trainer.validate` with `RetrievalImages` of the same recipe, which gives every rank
    its part of the images. What is searched is then brought to every rank, and each scores its own
    queries. A part (a warp, or a task) that is finished is kept on disk and not done again for the
    same weights, settings and images.

    Attributes:
        result: after the run, `values` (`patches_rotate5_same_patch_rate`, `images_map`,
            `copies_micro_map`, ..., fractions), `parts` (the same by warp or task), `notes` (what
            was left out and why) and `protocol`, one line.
    """

    def __init__(
        self,
        backbone: Backbone,
        recipe: RetrievalRecipe | None = None,
        *,
        feature: Feature = CLS,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        transform: str = "clean view",
        folder: Path | None = None,
    ):
        """Evaluate `backbone`.

        Args:
            backbone: loaded; it is not changed.
            recipe: what is looked for and how; None: all tasks as the papers do them.
            feature: of images; patches are read at its source and norm.
            mean: what the clean images were normalised with.
            std: and their scale.
            transform: what the clean view is, for the protocol.
            folder: for finished parts; None: nothing is kept.
        """
        super().__init__()
        self.backbone, self.recipe, self.feature = backbone, recipe or RetrievalRecipe(), feature
        self.mean, self.std, self.transform = mean, std, transform
        self.folder = folder
        self.result: dict[str, Any] = {}

    def on_validation_epoch_start(self) -> None:
        given = self.trainer.val_dataloaders
        count, wanted = len(given) if isinstance(given, list) else 1, self.recipe.loaders
        if count != len(wanted):
            raise UserError(
                f"retrieval: {count} loader(s) given; the tasks read {', '.join(wanted)}; call "
                "trainer.validate(module, datamodule=RetrievalImages(data, module.recipe))"
            )
        context = self.trainer.precision_plugin.forward_context
        reader = Reader(self.backbone, self.feature, self.mean, self.std, context)
        self._reader = reader
        self._stocks: dict[Loaded, Stock] = {
            name: Stock(reader, keep=name == "originals", read=name != "originals")
            for name in wanted
        }

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._stocks[self.recipe.loaders[dataloader_idx]].add(batch)

    def on_validation_epoch_end(self) -> None:
        retrieval = Retrieval(self.recipe, self._reader, self._stocks)
        del self._reader, self._stocks  # so that it can let go what it has done with
        with frozen(self.backbone):
            parts = self._compute(retrieval)
        values = {f"{part}_{k}": v for part, found in parts.items() for k, v in found.items()}
        self.result = {
            "values": values,
            "parts": parts,
            "notes": told(self.recipe, values),
            "protocol": self._protocol(parts),
        }
        self.log_dict({f"retrieval/{n}": float(v) for n, v in values.items()}, sync_dist=True)

    def _compute(self, retrieval: Retrieval) -> dict[str, Mapping[str, int | float]]:
        """All parts; those that are kept on every rank's disk are not computed again."""
        kept, parts = self._kept(retrieval), dict[str, Mapping[str, int | float]]()
        shown = self.trainer.is_global_zero and self.trainer.progress_bar_callback is not None
        with Progress(console=Console(stderr=True), disable=not shown, transient=True) as progress:
            task = progress.add_task("", total=len(self.recipe.parts))
            for part in self.recipe.parts:
                progress.update(task, description=part)
                done = kept is not None and part in kept.done
                # The ranks compute together or not at all.
                if gather(torch.tensor([done], device=self.device)).all() and kept is not None:
                    parts[part] = kept.done[part]
                else:
                    parts[part] = retrieval.compute(part)
                    if kept is not None:
                        kept.add(part, parts[part])
                progress.advance(task)
        return parts

    def _kept(self, retrieval: Retrieval) -> Parts | None:
        if self.folder is None:
            return None
        fed = (self.mean, self.std, self.transform, str(self.feature))
        run = ("retrieval 2", str(self.trainer.precision), retrieval.checksum())
        settings = digest_of(self.backbone, self.recipe, fed, *run)
        return Parts(self.folder / f"rank-{rank()}.jsonl", settings)

    def _protocol(self, parts: Mapping[str, Mapping[str, int | float]]) -> str:
        recipe, said = self.recipe, list[str]()
        if "patches" in recipe.tasks:
            bank = parts["patches_chance"]
            said.append(
                f"patches of {bank['images']} warped val images by {recipe.metric_of('patches')} "
                f"among the {bank['patches']} of the originals, the same patch is that of the same "
                f"{recipe.same}"
            )
        if found := parts.get("images"):
            where = "train" if recipe.database == "train" else "val without the query"
            floats = COPIES_HELD * found["database"] * self.feature.width(self.backbone.spec)
            held = -(-4 * int(floats) // 2**20)
            said.append(
                f"{found['queries']} val images by {recipe.metric_of('images')} among "
                f"{found['database']} of {where}, of which every rank holds at most "
                f"{held:,} MiB of features at once"
            )
        if found := parts.get("copies"):
            said.append(
                f"{found['queries']} copies ({recipe.copies} an original, 2 distortions each) by "
                f"{recipe.metric_of('copies')} among {found['database']} originals and distractors"
            )
        return (
            f"retrieval: {'; '.join(said)}; cleaning {recipe.cleaning} fitted on what is searched; "
            f"ties are lost; seed {recipe.seed}; {self.feature.about()} (patches: of the same "
            f"blocks), {self.transform}{in_words(self.trainer)}"
        )
