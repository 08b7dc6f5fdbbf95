"""Accuracy of a trained probe on degraded images, under `Trainer.validate`.

Each degradation is one pass over val, and a part that a stopped evaluation need not do again.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytorch_lightning as pl
import torch

from contramask.distributed import total
from contramask.functional.degradations import Degradation
from contramask.models.backbone import Backbone
from contramask.probes.evaluation import CleanData
from contramask.probes.features import CLS, Feature
from contramask.probes.knn import KNN
from contramask.probes.linear import LinearProbe, LinearRecipe
from contramask.probes.parts import Parts
from contramask.probes.robustness import classes_to_learn, relative_drop, right
from contramask.training.passes import Change, Read, Reader, missing
from contramask.training.precision import in_words
from contramask.types import UserError

log = logging.getLogger(__name__)

RECIPE = LinearRecipe()
Fitted = LinearProbe | KNN


@dataclass(frozen=True)
class Sweep:
    """What is read, and from what.

    Attributes:
        words: the degradations; `clean` is always among them.
        size: of the images, pixels a side.
        mean, std: how they are normalised.
        recipe: of the linear probe.
        feature: which.
        k: also the nearest neighbours, this many; None: not.
        seed: of the draws.
        limit: the most images of train and of val; None: all.

    Raises:
        UserError: for a word that means nothing, in general or at this size.
    """

    words: Sequence[str]
    size: int
    mean: Sequence[float]
    std: Sequence[float]
    recipe: LinearRecipe = RECIPE
    feature: Feature = CLS
    k: int | None = None
    seed: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        for each in self.degradations.values():
            each.check(self.size, self.size)

    @cached_property
    def degradations(self) -> dict[str, Degradation]:
        """By their words as they are written out, `clean` first."""
        made = [Degradation("clean"), *map(Degradation.parse, self.words)]
        return {str(each): each for each in made}

    def change(self, word: str) -> Change:
        """What is done to normalised images."""
        degradation = self.degradations[word]
        return lambda images, keys: degradation.of_normalised(
            images, keys, mean=self.mean, std=self.std, seed=self.seed
        )


def degraded_accuracies(
    trainer: pl.Trainer,
    backbone: Backbone,
    data: CleanData,
    sweep: Sweep,
    *,
    parts: Parts | None = None,
    transform: str = "clean view",
) -> dict[str, Any]:
    """Top-1 accuracy on val under each degradation, of probes fitted on clean images of train.

    Args:
        trainer: evaluates; without a distributed sampler.
        backbone: loaded; it is not changed.
        data: train and val.
        sweep: what is measured.
        parts: what is done already, on the first rank; that is not done again.
        transform: what the clean view is, for the protocol.

    Returns:
        `values` (`clean_top1`, `noise20_top1`, ...; with `k` also `noise20_k20_top1`), the table
        `degradations` and `protocol`. On other ranks than the first: nothing.

    Raises:
        UserError: for train or val without labels, train of one class, or `k` larger than train.
    """
    done: dict[str, Any] = {} if parts is None else parts.done
    add = done.__setitem__ if parts is None else parts.add
    left = missing(trainer, list(sweep.degradations), done)
    probes: list[Fitted] = []
    if left:
        train = Reader(backbone, feature=sweep.feature).over(trainer, data, "train", sweep.limit)
        probes = _fitted(train, sweep)
        del train
        add("protocol", {"probes": "; ".join(probe.protocol for probe in probes)})
    for word in left:
        reader = Reader(backbone, feature=sweep.feature, change=sweep.change(word), everyone=False)
        scores = _scores(probes, reader.over(trainer, data, "val", sweep.limit))
        add(word, scores)
        log.info("%s: top-1 %.2f %% of %d images", word, 100 * scores["top1"], scores["images"])
    if not trainer.is_global_zero:
        return {}
    return _degraded_result(done, sweep, transform, in_words(trainer))


def _fitted(train: Read, sweep: Sweep) -> list[Fitted]:
    x, y = train.x, train.y[:, 0]
    classes = classes_to_learn(y, "data.train")
    probes: list[Fitted] = [LinearProbe(x.shape[1], classes, recipe=sweep.recipe).to(x.device)]
    if sweep.k is not None:
        probes.append(KNN(classes, ks=(sweep.k,)))
    for probe in probes:
        probe.fit(x, y)
    return probes


def _scores(probes: Sequence[Fitted], val: Read) -> dict[str, float]:
    """Top-1 over all ranks, of images that each rank has its part of."""
    y = val.y[:, 0]
    names = [f"k{p.ks[0]}_top1" if isinstance(p, KNN) else "top1" for p in probes]
    hits = [right(probe, val.x, y).sum() for probe in probes]
    *counts, images = total(torch.stack([*hits, torch.tensor(len(y), device=y.device)])).tolist()
    if images == 0:
        raise UserError(
            "robustness probe: no image of val has a label; set data.val to labelled shards"
        )
    return {name: round(count / images, 6) for name, count in zip(names, counts, strict=True)} | {
        "images": images
    }


def _degraded_result(
    done: Mapping[str, Any], sweep: Sweep, transform: str, precision: str
) -> dict[str, Any]:
    clean = done["clean"]
    tops = [name for name in clean if name != "images"]
    table = [
        {
            "word": word,
            **{name: done[word][name] for name in tops},
            "relative_drop": relative_drop(clean["top1"], done[word]["top1"]),
            "about": degradation.about(),
        }
        for word, degradation in sweep.degradations.items()
    ]
    mean, std = (", ".join(f"{v:g}" for v in values) for values in (sweep.mean, sweep.std))
    values = {f"{row['word']}_{name}": row[name] for row in table for name in tops}
    return {
        "values": {**values, "images": clean["images"]},
        "degradations": table,
        "protocol": f"{done['protocol']['probes']}; {sweep.feature.about()}, no augmentation, "
        f"{transform}, normalised by mean ({mean}) and std ({std}); probes are fitted on clean "
        f"train images and score {clean['images']} val images, degraded after the crop as "
        f"`about` of each says; every draw is a function of (seed {sweep.seed}, key of the image, "
        f"word){precision}",
    }
