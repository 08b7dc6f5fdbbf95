"""Labelled features of many images: read batch by batch, brought together over ranks."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from contramask.distributed import gather, world
from contramask.models.backbone import Backbone
from contramask.probes.features import CLEAN, CLS, Feature, feature_set, frozen
from contramask.types import Batch, UserError

# Rows that travel between ranks at once: 200 MB of 768 floats.
ROWS = 65536


def read(
    backbone: Backbone, batch: Batch, wanted: Sequence[Feature], *, autocast: bool | None = False
) -> tuple[list[Float[Tensor, "B _"]], Int[Tensor, " B"]]:
    """Features and labels of a batch, from its view `clean` of one crop.

    Args:
        backbone: in eval mode.
        batch: normalised images on any device.
        wanted: which features.
        autocast: compute in bfloat16 where that is safe; features are float32 all the same. None:
            as the trainer's precision has it.

    Raises:
        UserError: for a batch without that view.
    """
    views = batch["views"]
    if CLEAN not in views:
        raise UserError(
            f"probe: the batch has the views {sorted(views)}; probes read one named {CLEAN!r} with "
            "one crop of each image; give the clean loaders of the data module"
        )
    assert len(views[CLEAN]) == 1, f"the view {CLEAN!r} has {len(views[CLEAN])} crops, not one"
    device = next(backbone.parameters()).device
    chosen = torch.autocast(device.type, torch.bfloat16, enabled=bool(autocast))
    with nullcontext() if autocast is None else chosen:
        x = feature_set(backbone, views[CLEAN][0].to(device), wanted)
    return x, batch["label"].to(device)


@dataclass
class Rows:
    """Labelled features as they come in, kept on one device. Unlabelled images are left out.

    Attributes:
        width: the length of a feature, wanted where a rank has no image at all.
        device: where they are kept.
    """

    width: int
    device: torch.device
    parts: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, x: Float[Tensor, "B F"], y: Int[Tensor, " B"]) -> None:
        """One batch more."""
        known = y >= 0
        self.parts.append((x[known].to(self.device), y[known].to(self.device)))

    def local(self) -> tuple[Float[Tensor, "N F"], Int[Tensor, " N"]]:
        """The rows of this rank."""
        nothing = (
            torch.empty((0, self.width), device=self.device),
            torch.empty(0, dtype=torch.long, device=self.device),
        )
        x, y = zip(nothing, *self.parts, strict=True)
        return torch.cat(x), torch.cat(y)


@torch.no_grad()
def gather_rows(
    x: Shaped[Tensor, "B ..."], *, via: torch.device | None = None
) -> Shaped[Tensor, "N ..."]:
    """Rows of all ranks in rank order, however many each has; on the device of x.

    Ranks fill up to the longest for the journey, and what they filled in is cut off again.

    Args:
        x: equal on all ranks but for the number of rows.
        via: the device the process group speaks through (NCCL: the GPU); None: the one of x.
    """
    if world() == 1:
        return x
    via = via or x.device
    sizes: list[int] = gather(torch.tensor([len(x)], device=via)).tolist()
    whole = x.new_empty((sum(sizes), *x.shape[1:]))
    for start in range(0, max(sizes), ROWS):
        rows = min(ROWS, max(sizes) - start)
        mine = x[start : start + rows]
        padded = torch.zeros((rows, *x.shape[1:]), dtype=x.dtype, device=via)
        padded[: len(mine)] = mine
        offset = start
        for size, block in zip(sizes, gather(padded).split(rows), strict=True):
            held = max(0, min(size - start, rows))
            whole[offset : offset + held] = block[:held]
            offset += size
    return whole


def extract(
    backbone: Backbone,
    batches: Iterable[Batch],
    *,
    feature: Feature = CLS,
    autocast: bool = False,
    store: torch.device | None = None,
    gathered: bool = True,
) -> tuple[Float[Tensor, "N F"], Int[Tensor, " N"]]:
    """Features and labels of all labelled images of `batches`.

    Holds 4 F bytes for each image (1.28 million images of 384 floats: 2 GB). With several ranks
    each brings its part, of any length, and all get everything; a sampler that repeats images to
    make the parts even would have them counted twice, so leave them uneven.

    Args:
        backbone: in any mode, which it has again afterwards.
        batches: normalised, with a view `clean` of one crop.
        feature: which.
        autocast: compute in bfloat16 where that is safe; features are float32 all the same.
        store: where features are kept; None: on the device of the backbone.
        gathered: False: the rows of this rank only.
    """
    device = next(backbone.parameters()).device
    rows = Rows(feature.width(backbone.spec), store or device)
    with frozen(backbone):
        for batch in batches:
            (x,), y = read(backbone, batch, [feature], autocast=autocast)
            rows.add(x, y)
    x, y = rows.local()
    return (gather_rows(x, via=device), gather_rows(y, via=device)) if gathered else (x, y)
