"""Shape against texture: what a frozen backbone tells of both cues, under `Trainer.validate`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Int
from torch import Tensor

from contramask.data.cues import CUES, CueBatch, CueShards, NamedShards, sources_of
from contramask.models.backbone import Backbone
from contramask.probes.cue_splits import check_split, groups_of, rate_in_words, skipped_of
from contramask.probes.features import CLS, Feature
from contramask.probes.linear import LinearProbe, LinearRecipe
from contramask.probes.parts import Parts
from contramask.probes.robustness import (
    SPLITS,
    Decisions,
    Split,
    classes_to_learn,
    deal,
    decodability,
    matched,
)
from contramask.training.passes import Read, Reader, missing
from contramask.training.precision import in_words
from contramask.types import UserError, fold

RECIPE = LinearRecipe()


@dataclass(frozen=True)
class CueStudy:
    """How shape and texture are compared.

    Attributes:
        recipe: of the linear probes.
        feature: which.
        folds: of the cross-validation.
        split: what no fold shares with another, see `probes.robustness.SPLITS`. All that the
            images allow are measured; this one gives the numbers in `values`. None: the first of
            source, other and random that the images allow.
        seed: of the folds.
        limit: the most images; None: all.

    Raises:
        UserError: for fewer than two folds.
    """

    recipe: LinearRecipe = RECIPE
    feature: Feature = CLS
    folds: int = 5
    split: Split | None = None
    seed: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise UserError(f"cue.folds is {self.folds}; allowed are 2 and more; set cue.folds")


def shape_and_texture(
    trainer: pl.Trainer,
    backbone: Backbone,
    cues: CueShards,
    study: CueStudy,
    *,
    photographs: NamedShards | None = None,
    parts: Parts | None = None,
    transform: str = "clean view",
) -> dict[str, Any]:
    """Decodability of both cues, and the shape bias where there are photographs to learn from.

    Only images whose shape and texture are of two classes are read.

    Args:
        trainer: evaluates; without a distributed sampler.
        backbone: loaded; it is not changed.
        cues: cue-conflict images.
        study: how they are compared.
        photographs: of classes with the same names; a probe learns those that both have.
        parts: what is done already, on the first rank; that is not done again.
        transform: what the clean view is, for the protocol.

    Returns:
        `values`, the table `cues` and `protocol`. On other ranks than the first: nothing.

    Raises:
        UserError: too few images for the folds, fewer than two classes, a split that is asked for
            and that keys do not tell or that has too few groups, or photographs of other classes.
    """
    done: dict[str, Any] = {} if parts is None else parts.done
    add = done.__setitem__ if parts is None else parts.add
    names = ["decodability"] + (["bias"] if photographs is not None else [])
    left = missing(trainer, names, done)
    if left:
        read = Reader(backbone, feature=study.feature, known=_known, columns=4)
        rows = read.over(trainer, cues, "train", study.limit)
        conflict = rows.y[:, 0] != rows.y[:, 1]
        kept = Read(rows.x[conflict], rows.y[conflict])
        if "decodability" in left:
            add("decodability", {"images": len(rows.y), **_decoded(kept, study)})
        if "bias" in left and photographs is not None:
            learnt = Reader(backbone, feature=study.feature)
            photos = learnt.over(trainer, photographs, "train", study.limit)
            add("bias", _bias(kept, photos, cues.names, photographs.names, study))
    if not trainer.is_global_zero:
        return {}
    result = _result(done, study, transform)
    return {**result, "protocol": result["protocol"] + in_words(trainer)}


def _known(batch: CueBatch) -> Int[Tensor, "B 4"]:
    """Shape, texture, and the pictures they come from as numbers (-1 where the key tells none)."""
    pairs = [sources_of(key) or () for key in batch.get("keys", [])]
    pictures = [[fold(name) for name in pair] or [-1, -1] for pair in pairs]
    sources = torch.tensor(pictures, device=batch["label"].device)
    return torch.cat([torch.stack([batch["label"], batch["texture"]], 1), sources], 1)


def _decoded(kept: Read, study: CueStudy) -> dict[str, Any]:
    """Both cues in each split that the images allow."""
    if len(kept.y) < study.folds:
        raise UserError(
            f"cue: {len(kept.y)} images with a conflict for {study.folds} folds; set cue.folds "
            "lower, or cue.data to more images"
        )
    grouped = groups_of(kept.y)
    skipped = skipped_of(grouped, study.folds, study.recipe)
    check_split(study.split, skipped)
    found: dict[str, Any] = {}
    for split, groups in grouped.items():
        for i, name in enumerate(CUES if split not in skipped else ()):
            y, other = kept.y[:, i], kept.y[:, 1 - i]
            strata = torch.zeros_like(y) if split == "other" else y
            seed = fold(study.seed, "cue", split, name)
            placed = deal(strata, groups[i], study.folds, seed=seed)
            result = decodability(kept.x, y, other, placed, study.recipe, groups[i])
            found.setdefault(split, {})[name] = {
                "top1": round(result.mean, 6),
                "spread": round(result.spread, 6),
                "folds": [round(value, 6) for value in result.folds],
                "chance_top1": round(1 / len(y.unique()), 6),
                "from_other_top1": round(result.from_other, 6),
                "unseen": result.unseen,
            }
    return {"conflict": len(kept.y), "splits": found, "skipped": skipped}


def _bias(
    kept: Read, photos: Read, names: list[str], learnt: list[str], study: CueStudy
) -> dict[str, Any]:
    """Decisions of a probe of photographs, on images both of whose cues it has learnt."""
    common = [name for name in names if name in learnt]
    if len(common) < 2:
        raise UserError(
            f"cue.train: {len(common)} of its classes have names that cue.data has too; at least "
            f"two are needed of {', '.join(names)}; correct classes.json beside its shards"
        )
    device = photos.x.device
    y = matched(learnt, common).to(device)[photos.y[:, 0]]
    both = matched(names, common).to(kept.y.device)[kept.y[:, :2]]
    asked = (both >= 0).all(1)
    if not bool(asked.any()):
        raise UserError(
            "cue.train: no image of cue.data has both its cues among the classes "
            f"{', '.join(common)}; set cue.train to photographs of more of its classes"
        )
    x, y = photos.x[y >= 0], y[y >= 0]
    classes_to_learn(y, "cue.train")
    probe = LinearProbe(x.shape[1], len(common), recipe=study.recipe).to(device)
    probe.fit(x, y)
    decided = probe.predict(kept.x[asked]).argmax(1)
    shape, texture = both[asked].unbind(1)
    of_all = Decisions.of(decided, shape, texture)
    by_class = {
        name: vars(Decisions.of(*(t[shape == i] for t in (decided, shape, texture))))
        for i, name in enumerate(common)
    }
    return {**vars(of_all), "by_shape": by_class, "classes": common, "probe": probe.protocol}


def _result(done: Mapping[str, Any], study: CueStudy, transform: str) -> dict[str, Any]:
    found = done["decodability"]
    check_split(study.split, found["skipped"])
    split: Split = study.split or next(iter(found["splits"]))
    chosen = found["splits"][split]
    shape, texture = (chosen[cue] for cue in CUES)
    values = {f"{cue}_top1": chosen[cue]["top1"] for cue in CUES}
    values |= {f"{cue}_chance_top1": chosen[cue]["chance_top1"] for cue in CUES}
    if shape["top1"] + texture["top1"] > 0:
        share = shape["top1"] / (shape["top1"] + texture["top1"])
        values["decodability_shape_share"] = round(share, 6)
    values["cue_images"] = found["conflict"]
    protocol = (
        f"cues: linear probes of shape and of texture on {found['conflict']} of {found['images']} "
        f"images, those whose cues conflict; {study.folds}-fold cross-validation in which "
        f"{SPLITS[split]}, mean over folds, seed {study.seed}; "
        f"{rate_in_words(split, study.recipe)}; {study.feature.about()}, {transform}"
    )
    for left_out, reason in found["skipped"].items():
        protocol += f"; the split {left_out!r} is not measured: {reason}"
    tables = {"cues": found}
    if "bias" not in done:
        return {"values": values, **tables, "protocol": f"{protocol}; no shape bias (no cue.train)"}
    bias = done["bias"]
    decisions = Decisions(*(bias[name] for name in ("shape", "texture", "neither")))
    values["cue_decided_rate"] = round(1 - decisions.neither / decisions.images, 6)
    if decisions.shape_bias is not None:
        values["shape_bias_rate"] = round(decisions.shape_bias, 6)
    protocol += (
        f"; shape bias: shape / (shape + texture) decisions on the {decisions.images} images both "
        f"of whose cues are among {', '.join(bias['classes'])}, of a probe of photographs "
        f"({bias['probe']})"
    )
    return {"values": values, **tables, "shape_bias": bias, "protocol": protocol}
