"""The one loop of all analyses: images through a frozen backbone, once for each view."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from contramask.analysis.analysis import Analysis, Seen, share
from contramask.analysis.grams import Grams
from contramask.analysis.reading import Reading, by_name
from contramask.analysis.record import recording
from contramask.analysis.views import transform
from contramask.distributed import gather, rank, world
from contramask.models.backbone import Backbone
from contramask.probes.features import CLEAN, frozen
from contramask.types import Batch, Spec, UserError, fold

log = logging.getLogger(__name__)


@dataclass
class Analysed:
    """What `analyse` gives.

    Attributes:
        readings: by name.
        images: how many were seen, over all ranks.
        seconds: this took, on this rank.
        broken: layers whose activations were not finite; their numbers are missing.
    """

    readings: dict[str, Reading]
    images: int
    seconds: float
    broken: list[str] = field(default_factory=list)

    def flat(self) -> dict[str, float]:
        """All numbers under stable keys, `attn/distance/block_11`."""
        return {k: v for reading in self.readings.values() for k, v in reading.flat().items()}


def analyse(
    backbone: Backbone,
    batches: Iterable[Batch | Tensor],  # of different lengths: no shape to bind
    analyses: Mapping[str, Analysis],
    *,
    autocast: bool = False,
    chunk: int = 64,
) -> Analysed:
    """Run all analyses over the same forward passes.

    The backbone is in eval mode and without gradient meanwhile, and as it was afterwards. With
    several ranks each brings its own batches, and all get the same result.

    Args:
        backbone: the eager module.
        batches: normalised images, or batches with a view `clean` of one crop.
        analyses: by name; what they have gathered before is forgotten.
        autocast: forward in bfloat16 where that is safe.
        chunk: images at once, or as many as make whole minibatches of CKA; bounds the memory,
            whatever the length of batches.

    Raises:
        UserError: no images; an analysis that does not fit the backbone.
    """
    chunk = whole_minibatches(chunk, analyses)
    start, seen, broken = time.perf_counter(), 0, dict[str, None]()
    device = next(backbone.parameters()).device
    for analysis in analyses.values():
        analysis.reset()
        analysis.to(device)
    quotas = {name: share(a.images, rank(), world()) for name, a in analyses.items()}
    replicates = max((a.replicates for a in analyses.values()), default=0)
    with frozen(backbone):
        for images, label, keys in _chunks(batches, chunk, device):
            wanted = {n: a for n, a in analyses.items() if seen < quotas[n]}
            if not wanted:
                break
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                found, spec = _forward(backbone, wanted, images, keys)
            weights = sample_weights(keys, replicates).to(device)
            for name, analysis in wanted.items():
                broken |= dict.fromkeys(_not_finite(found[name]))
                mine = weights[:, : 1 + analysis.replicates]
                analysis.update(Seen(found[name], label, mine, spec, images, tuple(keys)))
            seen += len(images)
    counts = gather(torch.tensor([seen], device=device)).tolist()
    if not min(counts):
        raise UserError(
            f"analysis: {sum(counts)} images over {len(counts)} ranks; each needs at least one "
            "batch; give more images or fewer ranks"
        )
    for layer in broken:
        log.warning("analysis: activations of %s are not finite; it has no numbers", layer)
    with torch.autocast(device.type, enabled=False):  # votes and spectra are for float32
        readings = [r for analysis in analyses.values() for r in analysis.compute().readings]
    return Analysed(by_name(readings), sum(counts), time.perf_counter() - start, list(broken))


def whole_minibatches(chunk: int, analyses: Mapping[str, Analysis]) -> int:
    """The length nearest to `chunk` that the longest minibatch divides."""
    longest = max((a.batch for a in analyses.values() if isinstance(a, Grams)), default=1)
    return max(1, round(chunk / longest)) * longest


def fitting(
    backbone: Backbone, analyses: Mapping[str, Analysis], size: tuple[int, int]
) -> tuple[dict[str, Analysis], list[str]]:
    """Which analyses fit a backbone, tried on a blank image of this size, and why others do not.

    Raises:
        UserError: if none does.
    """
    image = torch.zeros(1, 3, *size, device=next(backbone.parameters()).device)
    chosen, notes = {}, []
    for name, analysis in analyses.items():
        try:
            with frozen(backbone):
                _forward(backbone, {"": analysis}, image, ["blank"])
        except UserError as error:
            notes.append(f"{name} is left out: {error}")
        else:
            chosen[name] = analysis
    if not chosen:
        raise UserError(f"no analysis fits: {'; '.join(notes)}")
    return chosen, notes


def sample_weights(keys: Sequence[str], replicates: int) -> Float[Tensor, "B R"]:
    """How often each image is in the sample (once) and in its bootstrap replicates.

    Poisson with mean 1 in place of the multinomial, which nearly is one for many images: so a
    stream of unknown length, in any split over ranks, has one bootstrap (Chamandy et al., 2012).
    """
    weights = torch.ones(len(keys), 1 + replicates, dtype=torch.float64)
    for row, key in zip(weights, keys, strict=True):
        generator = torch.Generator().manual_seed(fold("bootstrap", key))
        row[1:] = torch.poisson(row[1:], generator=generator)
    return weights


def _chunks(
    batches: Iterable[Any], size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """Images, labels and keys, a few at a time."""
    seen = 0
    for batch in batches:
        if isinstance(batch, Tensor):
            images, label = batch, torch.full((len(batch),), -1)
            keys = [f"image {(seen + i) * world() + rank()}" for i in range(len(batch))]
        else:
            images, label = batch["views"][CLEAN], batch["label"]
            assert len(images) == 1, f"the view {CLEAN!r} has {len(images)} crops, not one"
            images = images[0]
            place = [f"image {batch['position'] + i}" for i in range(len(images))]
            keys = batch.get("keys") or place
        for i in range(0, len(images), size):
            here = slice(i, i + size)
            yield images[here].to(device), label[here].to(device), list(keys[here])
        seen += len(images)


def _forward(
    backbone: Backbone, analyses: Mapping[str, Analysis], images: Tensor, keys: Sequence[str]
) -> tuple[dict[str, dict[str, dict[str, Tensor]]], Spec]:
    patch, size = backbone.spec.patch, tuple(images.shape[-2:])
    if size[0] % patch or size[1] % patch:
        raise UserError(
            f"analysis: images of {size[0]} x {size[1]} pixels are no whole number of patches of "
            f"{patch}; give the backbone images of another size"
        )
    images = images.to(next(backbone.parameters()).dtype)
    spec = replace(backbone.spec, grid=(images.shape[2] // patch, images.shape[3] // patch))
    views = {t.view for a in analyses.values() for t in a.taps(spec).values()}
    found: dict[str, dict[str, dict[str, Tensor]]] = {name: {} for name in analyses}
    for view in sorted(views, key=lambda v: (v != "plain", v)):
        with recording(backbone, analyses, view, spec) as (some, final):
            final(backbone(transform(view, images, keys)))
        for name, taps in some.items():
            found[name] |= taps
    return found, spec


def _not_finite(found: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    return [
        layer
        for layers in found.values()
        for layer, value in layers.items()
        if value.is_floating_point() and not value.isfinite().all()
    ]
