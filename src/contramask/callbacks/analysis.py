"""Analyses while training goes on: the same images every time, the weights as they are."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch

from contramask.analysis.grams import Grams, GramStack
from contramask.analysis.over_time import Course
from contramask.analysis.reading import Reading
from contramask.analysis.run import Analysed, analyse, fitting
from contramask.analysis.suite import Settings, suite
from contramask.callbacks.cadence import Cadence
from contramask.callbacks.online_probes import clean_data, network, undisturbed
from contramask.checkpoints.sources import Source
from contramask.distributed import alone
from contramask.probes.evaluation import CleanData
from contramask.probes.features import CLEAN
from contramask.tracking.wandb import Tracker
from contramask.types import Batch, UserError

log = logging.getLogger(__name__)

# Axes of what is a number a step; the rest is kept in files and drawn.
SHORT = {"layer", "feature"}


class AnalysisCallback(pl.Callback):
    """Every so many updates: CKA, attention, frequencies, geometry of the network by depth.

    Logs `attn/distance/block_11`, `fourier/high/...`, `repr/rankme`, `repr/effective_rank/...`, and
    of the outputs of blocks `cka/initial/block_11`, `cka/previous/...`, `cka/NAME/...` of each
    anchor; with two anchors also `cka/coordinate/...`, which is +1 where the network is like the
    first and -1 where it is like the second. All tables go to `step-00001000.json` in the folder,
    with figures of curves over depth and of CKA, which go to W&B too. `analysis/seconds` and
    `analysis/share` are what it costs, the latter of the time since this start of training.

    Rank 0 works alone, on images it keeps in memory, and the others wait for it. Training is
    bitwise the same with it and without it. Resumed, a run goes on comparing with its own start.

    Args:
        folder: where; None: `analysis` in the trainer's `default_root_dir`.
        every: updates between two analyses; 0: never. Update 0 and the last are analysed as well.
        images: of the validation set, or of the training set if there is none.
        analyses: which, see `suite.NAMES`.
        anchors: name -> a frozen model, a run or whatever `contramask compare` takes, e.g.
            {contrastive: runs/moco, masked: runs/mae}. They are fed the run's images as they are,
            in its size and normalisation.
        net: whose weights.
        settings: see `suite.Settings`; CKA is of block outputs, without intervals, if None.
        figures: draw and send figures.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        every: int = 2000,
        images: int = 256,
        analyses: Sequence[str] = ("cka", "attention", "fourier", "geometry"),
        anchors: Mapping[str, str] | None = None,
        net: Literal["student", "teacher"] = "student",
        settings: Settings | None = None,
        figures: bool = True,
    ):
        if every < 0 or images < 1:
            raise UserError(
                f"analysis: every is {every} and images is {images}; every is at least 0 updates "
                "(0: never), images at least 1; set analysis.every and analysis.images"
            )
        self.folder = None if folder is None else Path(folder)
        self.every, self.images, self.net, self.figures = every, images, net, figures
        live = Settings(replicates=0, cka=("flat/raw",), sublayers=("block",))
        self.settings = settings or live
        self.analyses = suite(analyses, self.settings)
        self.anchors = dict(anchors or {})
        self.course = Course()
        self._images: Any = None  # one batch, on the host
        self._told = False  # that there are too few images for CKA
        self._cadence = Cadence(every)
        self._off, self._spent, self._began = False, 0.0, 0.0

    # ---- when --------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.folder = self.folder or Path(trainer.default_root_dir) / "analysis"
        network(pl_module, self.net)  # a misspelt wish is told before the first step
        for name, path in self.anchors.items():
            try:
                Source.parse(path)
            except UserError as error:
                raise UserError(f"analysis: anchor {name}: {error}; set analysis.anchors") from None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._cadence.start(trainer)
        self._began = time.perf_counter()
        if self.every and trainer.is_global_zero:
            self._prepare(trainer, pl_module)
            if trainer.global_step == 0:
                self._look(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._cadence.due(trainer) and trainer.is_global_zero:
            self._look(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """What the network was like at its start and last time."""
        return self.course.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.course.load_state_dict(state_dict)

    # ---- what --------------------------------------------------------------------------------

    def _prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the images, and run the anchors over them once."""
        with undisturbed(pl_module.device), alone():
            data = clean_data(trainer)
            try:
                self._images = self._read(data)
                size = self._images["views"][CLEAN].shape[-2:]
                backbone = network(pl_module, self.net)
                self.analyses, notes = fitting(backbone, self.analyses, (size[0], size[1]))
            except UserError as error:
                log.warning("analyses are off: %s", error)
                self._off = True
                return
            for note in notes:
                log.warning("analysis: %s", note)
            for name, path in self.anchors.items():
                try:
                    self.course.anchors[name] = self._anchor(path, data, pl_module.device)
                except UserError as error:  # the other ranks do not know of it and go on
                    log.warning("analysis goes on without anchor %s: %s", name, error)

    def _read(self, data: CleanData) -> Batch:
        try:
            found = list(data.clean_dataloader("val", limit=self.images))
        except UserError:  # there is no validation set
            found = list(data.clean_dataloader("train", limit=self.images))
        if not found:
            raise UserError("there are no images to look at; set data.val")
        # As one, so that minibatches of CKA do not hang on the length of training's batches.
        first = found[0]
        first["views"] = {CLEAN: torch.cat([b["views"][CLEAN] for b in found], 1)}
        first["label"] = torch.cat([b["label"] for b in found])
        first["keys"] = [key for b in found for key in b.get("keys", ())]
        return first

    def _anchor(self, path: str, data: CleanData, device: torch.device) -> dict[str, GramStack]:
        grams = {k: a for k, a in self.analyses.items() if isinstance(a, Grams)}
        if not grams:
            raise UserError("anchors are compared by cka; put it into analysis.analyses")
        backbone, _ = Source.parse(path).load()
        analyse(backbone.to(device), [data.to_device(self._images, device)], grams)
        return self._stacks()

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._off:
            return
        start, data = time.perf_counter(), clean_data(trainer)
        with (
            undisturbed(pl_module.device),
            alone(),
            torch.compiler.set_stance("force_eager"),  # other shapes are no reason to compile
            trainer.precision_plugin.forward_context(),
        ):
            images = data.to_device(self._images, pl_module.device)
            try:
                found = analyse(network(pl_module, self.net), [images], self.analyses)
            except UserError as error:
                log.warning("analyses are off: %s", error)
                self._off = True
                return
            compared = self.course.compare(self._stacks())
        self._tell(trainer, found, compared)
        self._spent += time.perf_counter() - start
        elapsed = max(time.perf_counter() - self._began, 1e-9)
        cost = {"analysis/seconds": time.perf_counter() - start}
        self._log(trainer, {**cost, "analysis/share": self._spent / elapsed})

    def _stacks(self) -> dict[str, GramStack]:
        stacks = {}
        for analysis in self.analyses.values():
            if isinstance(analysis, Grams):
                try:
                    stacks[analysis.name] = analysis.stack()
                except UserError as error:  # too few images; all else is told
                    if not self._told:
                        log.warning("analysis: %s", error)
                    self._told = True
        return stacks

    # ---- where it goes -------------------------------------------------------------------------

    def _tell(self, trainer: pl.Trainer, found: Analysed, compared: list[Reading]) -> None:
        readings = {**found.readings, **{r.name: r for r in compared}}
        short = readings.values()
        numbers = {k: v for r in short if set(r.axes) <= SHORT for k, v in r.flat().items()}
        self._log(trainer, numbers)
        trainer.callback_metrics.update({k: torch.tensor(v) for k, v in numbers.items()})
        assert self.folder is not None
        step = trainer.global_step
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"step-{step:08d}.json"
            content = {"step": step, "images": found.images, "broken": found.broken}
            content["readings"] = [r.to_json() for r in readings.values()]
            path.write_text(json.dumps(content, allow_nan=False) + "\n", "utf-8")
            pictures = self._draw(readings, step) if self.figures else {}
        except OSError as error:  # a full disk: an analysis is not worth a run
            log.warning("no analysis in %s: %s", self.folder, error)
            return
        for logger in trainer.loggers:
            if isinstance(logger, Tracker) and pictures:
                logger.log_pictures(pictures, step=step)

    def _draw(self, readings: Mapping[str, Reading], step: int) -> dict[str, Path]:
        from contramask.report.live import draw  # a second to import: on rank 0 alone

        assert self.folder is not None
        return draw(readings, self.folder, step)

    def _log(self, trainer: pl.Trainer, numbers: Mapping[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(dict(numbers), step=trainer.global_step)
            logger.save()
