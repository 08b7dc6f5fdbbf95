"""Probes of single patches of a frozen backbone, under `Trainer.validate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from contramask.data.dense import Dense
from contramask.data.dense_pictures import side_by_side, write_picture
from contramask.distributed import total
from contramask.functional.segmentation import VOID, confusion, pixels_of_class, scores
from contramask.models.backbone import Backbone
from contramask.probes.features import Feature, Norm, patch_feature_set
from contramask.probes.patches import Cell, PatchRecipe, PatchRows, SourceProbe
from contramask.training.clean_loaders import check_loaders
from contramask.training.patch_protocol import protocol
from contramask.training.precision import in_words
from contramask.types import UserError

DEFAULT = PatchRecipe()
TILES = 64  # that go through the backbone at once


class PatchEvaluation(pl.LightningModule):
    """mIoU of k-NN and linear probes of single patches (arXiv:2401.00463).

    Runs under `Trainer.validate` with the loaders of `DenseShards`, train and val. Every source is
    read from one forward. The labelled patches of train are brought together, so that every rank
    holds all of them; each image of val is scored where it is read, and confusion matrices are
    summed. The rows of train stand in the order of their images, so the number of ranks changes
    nothing.

    Memory beside the backbone: for each source 4 F bytes a labelled patch of train for its rows,
    and as much again for each further cleaning; on several ranks once more of one source while it
    is gathered. 72 images of 1024 x 2048 pixels in tiles of 256 are 451,584 patches: 1.4 GB at
    F = 768. Of val a micro-batch at a time is held.

    Attributes:
        result: after the run, `values` (of the first source: `knn_miou` and `knn_pixel_top1` of the
            first k-NN, `linear_miou`, ...; fractions), `table` (a row for each source and probe,
            with `iou` of each class, null where it is neither in masks nor predictions), `classes`,
            `absent` (classes without a patch in train, without a pixel in val), `protocol`.
    """

    def __init__(
        self,
        backbone: Backbone,
        dense: Dense,
        *,
        sources: Sequence[str] = ("last",),
        norm: Norm = "final",
        recipe: PatchRecipe = DEFAULT,
        names: Sequence[str] | None = None,
        pictures: tuple[Path, int] | None = None,
    ):
        """Evaluate `backbone`.

        Args:
            backbone: loaded; it is not changed.
            dense: how the data cuts images.
            sources: where in depth, see `Feature`.
            norm: the backbone's final one over each of them, or none.
            recipe: metrics, cleanings, numbers of neighbours, the linear layer.
            names: of the classes; None: their numbers.
            pictures: a folder, and how many of the first images of val are drawn there.

        Raises:
            UserError: for no source, a block that the backbone does not have, or a number of names
                that is not that of the classes.
        """
        super().__init__()
        if not sources:
            raise UserError("patches: no source is given; set --sources, e.g. to [last]")
        self.names = list(names or map(str, range(dense.classes)))
        if len(self.names) != dense.classes:
            raise UserError(
                f"segmentation: classes is {dense.classes}, and classes.json beside the shards "
                f"names {len(self.names)}; set --classes to as many"
            )
        self.backbone, self.dense, self.recipe = backbone, dense, recipe
        self.sources, self.pictures = tuple(sources), pictures
        self.norm: Norm = norm
        features = [Feature(source, "mean", norm) for source in sources]
        self.widths = [feature.width(backbone.spec) for feature in features]
        self.cells = recipe.cells()
        self.result: dict[str, Any] = {}

    def on_validation_epoch_start(self) -> None:
        check_loaders(self.trainer.val_dataloaders)
        self._rows = PatchRows(self.widths, self.device)
        self._probes: list[SourceProbe] | None = None
        shape = (len(self.sources), len(self.cells), self.dense.classes, self.dense.classes)
        self._confused = torch.zeros(shape, dtype=torch.long, device=self.device)
        self._scored = 0  # images of val
        self._places: tuple[tuple[int, ...], Tensor] | None = None

    def validation_step(
        self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        features = self._read(batch["tiles"])
        if dataloader_idx == 0:
            counts = torch.tensor(batch["counts"], device=self.device)
            image = batch["position"] + torch.arange(len(counts), device=self.device)
            image = image.repeat_interleave(counts)
            self._rows.add(features, batch["labels"], image, images=len(counts))
            return
        # Whichever rank makes the probes, in whatever hook: they are of float32 under autocast too.
        with torch.autocast(self.device.type, enabled=False):
            self._score(batch, features)

    def on_validation_epoch_end(self) -> None:
        probes = self._fitted()  # also on a rank that has no image of val
        confused = total(self._confused).cpu()
        counts = torch.tensor([self._rows.count, self._scored], device=self.device)
        train, val = total(counts).tolist()
        labels = probes[0].labels
        patches = labels.bincount(minlength=self.dense.classes).cpu()
        table = [
            self._row(source, cell, probe, confused[i, j])
            for i, (source, probe) in enumerate(zip(self.sources, probes, strict=True))
            for j, cell in enumerate(self.cells)
        ]
        values: dict[str, float] = {}
        for row in table:
            for key in ("miou", "pixel_top1"):  # of the first of each kind
                values.setdefault(f"{row['probe']}_{key}", row[key])
        values |= {"train_images": train, "train_patches": len(labels), "images": val}
        absent = {"train": patches == 0, "val": confused[0, 0].sum(1) == 0}
        self.result = {
            "values": values,
            "table": table,
            "classes": self.names,
            "absent": {
                split: [n for n, gone in zip(self.names, a.tolist(), strict=True) if gone]
                for split, a in absent.items()
            },
            "protocol": protocol(self.dense, self.recipe, probes[0], self.norm, values)
            + in_words(self.trainer),
        }
        del self._rows, self._probes, self._confused
        self.log_dict({f"patches/{n}": float(v) for n, v in values.items()}, sync_dist=True)

    def _read(self, tiles: Float[Tensor, "T 3 S S"]) -> list[Float[Tensor, "T N _"]]:
        """The patches of every source."""
        parts = [
            patch_feature_set(self.backbone, part, self.sources, norm=self.norm)
            for part in tiles.split(TILES)
        ]
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    def _fitted(self) -> list[SourceProbe]:
        """The probes, made when the first image of val comes: train is then complete."""
        if self._probes is None:
            labels, image, order = self._rows.gathered()
            if not len(labels):
                raise UserError(
                    "patches: no patch of train has a label; see the warnings of the loader, and "
                    "set --classes and --ignore as the masks are labelled"
                )
            self._probes = [
                SourceProbe(
                    self._rows.features(i, order),
                    labels,
                    image,
                    classes=self.dense.classes,
                    recipe=self.recipe,
                )
                for i in range(len(self.sources))
            ]
        return self._probes

    def _score(self, batch: dict[str, Any], features: Sequence[Tensor]) -> None:
        patches = batch["labels"].shape[1]
        counts = [count * patches for count in batch["counts"]]
        places = [self._place(mask) for mask in batch["masks"]]
        pixels = torch.cat(
            [
                pixels_of_class(place, mask.long(), count, self.dense.classes)
                for place, mask, count in zip(places, batch["masks"], counts, strict=True)
            ]
        )
        inside = torch.cat(
            [
                place.flatten().bincount(minlength=count) > 0
                for place, count in zip(places, counts, strict=True)
            ]
        )
        self._scored += len(counts)
        for i, (probe, x) in enumerate(zip(self._fitted(), features, strict=True)):
            predicted = probe.predict(x.flatten(0, 1)[inside])
            for j, cell in enumerate(self.cells):
                self._confused[i, j] += confusion(pixels[inside], predicted[cell])
            if i == 0 and self.pictures is not None:
                whole = torch.full((len(self.cells), len(inside)), VOID, device=self.device)
                for j, cell in enumerate(self.cells):
                    whole[j, inside] = predicted[cell]
                self._draw(batch, places, whole.split(counts, dim=1))

    def _place(self, mask: Int[Tensor, "H W"]) -> Int[Tensor, "H W"]:
        """The patch of each pixel; images of one size, one after the other, share it."""
        height, width = mask.shape
        if self._places is None or self._places[0] != (height, width):
            seen = self.dense.resized(height, width)
            place = self.dense.tiling.patch_of_pixel(height, width, seen=seen)
            self._places = ((height, width), place.to(self.device))
        return self._places[1]

    def _draw(
        self, batch: dict[str, Any], places: Sequence[Tensor], predicted: Sequence[Tensor]
    ) -> None:
        """The first images of val: the truth, the first k-NN and the first linear layer."""
        assert self.pictures is not None
        folder, most = self.pictures
        first = {cell.probe: j for j, cell in reversed(list(enumerate(self.cells)))}
        for n, (key, place) in enumerate(zip(batch["keys"], places, strict=True)):
            if batch["position"] + n >= most:
                return
            masks = {"truth": batch["masks"][n].cpu().numpy()}
            for j in sorted(first.values()):
                joined = predicted[n][j][place]
                masks[f"{self.sources[0]}: {self.cells[j]}"] = joined.cpu().numpy()
            sheet = side_by_side(batch["pictures"][n].cpu().numpy(), masks, self.names)
            write_picture(sheet, folder / f"{key.replace('/', '_')}.png")

    def _row(
        self, source: str, cell: Cell, probe: SourceProbe, confused: Int[Tensor, "C C"]
    ) -> dict[str, Any]:
        """One row of the table."""
        found = scores(confused)
        what: dict[str, Any] = {"source": source, "probe": cell.probe, "cleaning": cell.cleaning}
        if cell.metric is None:
            what |= {"rate": probe.heads[cell.cleaning].rates[0]}
        else:
            votes = self.recipe.voting(cell.metric)
            what |= {"metric": cell.metric, "k": cell.k, "votes": votes}
        rounded = [None if value is None else round(value, 6) for value in found.iou]
        miou, right = round(found.miou, 6), round(found.pixel_top1, 6)
        return {**what, "miou": miou, "pixel_top1": right, "iou": rounded}
