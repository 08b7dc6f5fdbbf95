"""The checkpoints of running jobs, as they appear."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from contramask.checkpoints.export import SHEET, export_backbone, load_backbone
from contramask.checkpoints.importing import import_backbone
from contramask.checkpoints.sidecar import records
from contramask.checkpoints.sources import Source
from contramask.types import UserError

log = logging.getLogger(__name__)


class Watch:
    """Iterates over new weights of runs, the oldest first, until the runs are done.

    Each checkpoint is copied as a backbone the moment it is seen, for its run may delete it; what
    comes and goes between two looks, while others are evaluated, is missed. The newest export of a
    run counts as one too. A run is done when weights of its last step (`trainer.max_steps` of its
    configuration) were given out.

    Args:
        sources: run directories.
        out: where copies go: `steps/NAME-STEP`.
        poll: seconds between two looks.
        patience: seconds without news after which it ends.
        sleep: waits; a parameter for tests.

    Raises:
        UserError: for a model that is no run.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        out: Path,
        *,
        poll: float,
        patience: float,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.sources, self.out = sources, out
        self.poll, self.patience, self.sleep = poll, patience, sleep
        self._given: set[tuple[str, int]] = set()
        for source in sources:
            if not _is_pretraining(source.path):
                raise UserError(
                    f"--watch: {source.path} is no run directory with a config.yaml of `contramask "
                    "pretrain`; watch one"
                )

    def __iter__(self) -> Iterator[Source]:
        waited = 0.0
        while True:
            fresh = [pair for source in self.sources for pair in self._fresh(source)]
            for step, source in sorted(fresh, key=lambda pair: pair[0]):
                waited = 0.0
                yield source
                log.info("%s evaluated, step %d", source.name, step)
            if all(map(self._done, self.sources)):
                return
            if not fresh:
                waited += self.poll
                if waited > self.patience:
                    log.warning("no new checkpoint for %.1f hours; ending", waited / 3600)
                    return
                self.sleep(self.poll)

    def _fresh(self, source: Source) -> list[tuple[int, Source]]:
        """Copies of what was not given out yet."""
        found = []
        for path, step in _weights(source.path):
            if (source.name, step) in self._given:
                continue
            name = f"{source.name}-{step:08d}"
            folder = self.out / "steps" / name
            try:
                if not (folder / SHEET).is_file():
                    _copy(source.path, path, folder)
            except (UserError, FileNotFoundError) as error:  # deleted meanwhile, or damaged
                log.warning("%s is left out: %s", path, error)
                continue
            self._given.add((source.name, step))
            found.append((step, Source(name, folder)))
        return found

    def _done(self, source: Source) -> bool:
        return (source.name, _config(source.path)["trainer"]["max_steps"]) in self._given


def _weights(run: Path) -> list[tuple[Path, int]]:
    """What holds weights in a run, and their step: whole checkpoints, then its export."""
    files = [*sorted((run / "checkpoints").glob("step-*.ckpt")), run / "checkpoints" / "last.ckpt"]
    # Without its sidecar a file is being written or deleted: the next look will tell.
    found = {known[0].step: file for file in files if (known := records(file)) and file.exists()}
    if (run / SHEET).is_file():
        step = int(yaml.safe_load((run / SHEET).read_text("utf-8"))["step"])
        found.setdefault(step, run)
    return [(path, step) for step, path in found.items()]


def _copy(run: Path, path: Path, folder: Path) -> None:
    """Export what is at `path`, a checkpoint of a run or the run's own export."""
    if path == run:
        backbone, sheet = load_backbone(run)
        net, step, data = sheet["weights"]["net"], sheet["step"], sheet["data"]
        export_backbone(backbone, folder, net=net, step=step, data=data)
        return
    config = _config(run)
    images = config["data"]["images"]
    data = {key: images[key] for key in ("size", "resize", "mean", "std")}
    found = import_backbone(path, net=config["export"]["net"])
    export_backbone(found.backbone, folder, net=found.net, step=found.step, data=data)


def _is_pretraining(run: Path) -> bool:
    if not (run / "config.yaml").is_file():
        return False
    config = _config(run)
    return isinstance(config, dict) and {"model", "data", "export", "trainer"} <= config.keys()


def _config(run: Path) -> Any:
    return yaml.safe_load((run / "config.yaml").read_text("utf-8"))
