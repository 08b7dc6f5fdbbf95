"""Tracking by a frozen backbone, under `Trainer.validate`: a video a step."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from contramask.data.video_files import frame_size, read_frames, write_mask
from contramask.data.videos import Video, VideoSet
from contramask.distributed import rank, world
from contramask.models.backbone import Backbone
from contramask.probes.extraction import gather_rows
from contramask.probes.parts import Parts
from contramask.probes.track import Clip, TrackRecipe, track
from contramask.probes.video_scores import summary
from contramask.training.precision import in_words
from contramask.types import UserError, fold

DINO = TrackRecipe()


class TrackVideos(pl.LightningDataModule):
    """The videos of a set, each on one rank.

    `Trainer(use_distributed_sampler=False).validate(evaluation, datamodule=TrackVideos(found))`.
    """

    def __init__(self, found: VideoSet):
        super().__init__()
        self.found = found

    def val_dataloader(self) -> "_Part":
        return _Part(self.found.videos)

    def transfer_batch_to_device(
        self, batch: Video | None, device: torch.device, dataloader_idx: int
    ) -> Video | None:
        """Paths go nowhere."""
        return batch


class _Part:
    """The videos of this rank; None where other ranks have one more, so that all step alike."""

    def __init__(self, videos: list[Video]):
        rows = -(-len(videos) // world())
        mine: list[Video | None] = [*videos[rank() :: world()]]
        self.videos = mine + [None] * (rows - len(mine))

    def __len__(self) -> int:
        return len(self.videos)

    def __iter__(self) -> Iterator[Video | None]:
        return iter(self.videos)


class TrackEvaluation(pl.LightningModule):
    """J, F and instance matching of a set of videos.

    Runs under `Trainer.validate` with `TrackVideos`. A video that is finished is on the disk, and
    is not tracked again by a later call with the same settings, files and number of ranks.

    Attributes:
        result: after the run, `values`, `videos` (video: object: J and F), `instances` (gap:
            counts) and `protocol`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: Backbone,
        found: VideoSet,
        folder: Path,
        *,
        weights: str,
        recipe: TrackRecipe = DINO,
        short_side: int = 480,
        long_side: int | None = None,
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
        masks: bool = False,
        batch_size: int = 8,
        workers: int = 2,
    ):
        """Evaluate `backbone`.

        Args:
            backbone: loaded; it is not changed.
            found: the videos.
            folder: where finished videos and masks are kept.
            weights: their checksum, see `digest_of`: videos of other weights are tracked anew.
            recipe: how objects are followed.
            short_side: of frames, in pixels, see `frame_size`.
            long_side: of frames; None: so that their shape stays.
            mean: of the normalisation.
            std: of the normalisation.
            masks: write predicted masks to FOLDER/VIDEO/00001.png.
            batch_size: frames of one forward.
            workers: threads that read frames.

        Raises:
            UserError: for a batch size or workers below 1, or frames smaller than a patch.
        """
        super().__init__()
        if batch_size < 1 or workers < 1:
            raise UserError(
                f"track: batch_size is {batch_size} and workers {workers}; both are at least 1"
            )
        self.backbone, self.found, self.folder, self.recipe = backbone, found, folder, recipe
        self.sides = {"short_side": short_side, "long_side": long_side}
        self.masks, self.batch_size, self.workers = masks, batch_size, workers
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        for video in found.videos:
            self.size_of(video)
        self.weights = weights
        self.result: dict[str, Any] = {}

    def size_of(self, video: Video) -> tuple[int, int]:
        """(height, width) that its frames are resized to."""
        return frame_size(video.size, patch=self.backbone.spec.patch, **self.sides)

    def on_validation_epoch_start(self) -> None:
        self._settings = self._checksum()
        self._parts = Parts(self.folder / f".parts-{rank()}-of-{world()}.jsonl", self._settings)

    def validation_step(self, batch: Video | None, batch_idx: int) -> None:
        if batch is None or (batch.name in self._parts.done and self._written(batch)):
            return
        clip = Clip(self._frames(batch), batch.mask, batch.objects, batch.categories)

        def write(index: int, mask: Tensor) -> None:
            write_mask(self._path(batch, index), mask)

        writes, written = write if self.masks else None, self._mark(batch)
        if self.masks:
            written.unlink(missing_ok=True)  # a stop on the way leaves masks of two settings
        record = track(self.backbone, clip, self.recipe, batch_size=self.batch_size, write=writes)
        if self.masks:
            written.write_text(self._settings, "utf-8")
        self._parts.add(batch.name, record)

    def on_validation_epoch_end(self) -> None:
        names = {video.name for video in self.found.videos}
        mine = {name: value for name, value in self._parts.done.items() if name in names}
        found = _shared(mine, self.device)
        if missing := sorted(names - found.keys()):
            raise UserError(
                f"track: {len(missing)} of {len(names)} videos not reached ({missing[0]} ...): "
                "the trainer stopped early; set --limit in place of --trainer.limit_val_batches"
            )
        tables = {video.name: found[video.name] for video in self.found.videos}
        self.result = summary(tables, self.found.skipped)
        self.result["protocol"] = self._protocol(self.result["values"])
        values = self.result["values"].items()
        self.log_dict({f"track/{n}": float(v) for n, v in values}, sync_dist=True, batch_size=1)

    def _frames(self, video: Video) -> Iterator[Tensor]:
        size = self.size_of(video)
        for frame in read_frames(video.frames, size, stored=video.size, workers=self.workers):
            yield (frame.to(self.device).float() / 255 - self.mean) / self.std

    def _path(self, video: Video, index: int) -> Path:
        return self.folder / video.name / f"{video.frames[index].stem}.png"

    def _mark(self, video: Video) -> Path:
        """The file that says which settings the masks of a video are of."""
        return self.folder / video.name / ".settings"

    def _written(self, video: Video) -> bool:
        """Whether no mask is to be written: none is wanted, or all of these settings are there."""
        paths = [self._path(video, index) for index in range(1, len(video.frames))]
        mark = self._mark(video)
        return not self.masks or (
            mark.is_file()
            and mark.read_text("utf-8") == self._settings
            and all(path.is_file() for path in paths)
        )

    def _checksum(self) -> str:
        """A checksum of all that the numbers hang on."""
        found = self.found.videos
        videos = [(v.name, v.stamp, v.size, sorted(v.categories.items())) for v in found]
        fed = (self.mean.flatten().tolist(), self.std.flatten().tolist(), self.sides)
        run = ["track 2", str(self.trainer.precision), self.weights]
        return f"{fold(json.dumps([*run, asdict(self.recipe), fed, videos])):016x}"

    def _protocol(self, values: dict[str, float]) -> str:
        long = self.sides["long_side"]
        shape = "in the video's shape, rounded down" if long is None else f"long side {long}"
        sizes = {self.size_of(video) for video in self.found.videos}
        names = ", ".join(f"{h} x {w}" for h, w in sorted(sizes)[:3])
        more = " and others" if len(sizes) > 3 else ""
        gaps = ", ".join(str(delta) for delta in self.recipe.deltas)
        return (
            f"{self.recipe.about()}; frames with short side {self.sides['short_side']}, {shape}: "
            f"{names}{more} pixels; J and F (tolerance 0.008 of the diagonal) at the videos' own "
            f"size over frames without the first and last, mean over {values['objects']} objects "
            f"of {values['videos']} videos ({values['skipped_videos']} skipped, "
            f"{values['unscored_videos']} without a mask to score); instances: "
            f"RoIAlign 7 x 7 of true boxes, {self.recipe.similarity}, gaps of {gaps} frames"
            f"{in_words(self.trainer)}"
        )


def _shared(mine: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What all ranks have, on all of them."""
    text = bytearray((json.dumps(mine) + "\n").encode())
    rows = gather_rows(torch.frombuffer(text, dtype=torch.uint8).to(device))
    found: dict[str, Any] = {}
    for line in rows.cpu().numpy().tobytes().decode().splitlines():
        found |= json.loads(line)
    return found
