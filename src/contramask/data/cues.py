"""Cue-conflict images: the shape of one class in the texture of another (Geirhos et al., 2019,
arXiv:1811.12231).

A sample is `KEY.jpg` with `KEY.json`, {"shape": s, "texture": t}: numbers or names of the classes
that `classes.json` beside the shards lists. `KEY.cls` is optional and says the shape again.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from contramask.data.examples import CLEAN, Examples, Images
from contramask.data.faults import BadSample
from contramask.data.index import classes_of
from contramask.data.module import ImageShards
from contramask.data.sequential import SequentialSweep
from contramask.data.shard_set import ShardSet, find_shards
from contramask.data.shards import ShardSweep
from contramask.data.streaming import Streaming
from contramask.data.views import EvalView
from contramask.errors import UserError
from contramask.types import Batch

CUES = ("shape", "texture")
Patterns = str | list[str] | dict[str, float]
_PAIR = re.compile(r"([^\W\d]+\d+)-([^\W\d]+\d+)")


class CueBatch(Batch):
    """A batch whose `label` is the shape, with the texture beside it."""

    texture: Int[Tensor, " B"]


class Cues(NamedTuple):
    """The square of an image and the classes of both its cues."""

    square: UInt8[Tensor, "3 S S"]
    shape: int
    texture: int


def cues_of(members: Mapping[str, bytes], names: Sequence[str]) -> tuple[int, int]:
    """The classes of shape and texture that the members of a sample name.

    Raises:
        BadSample: no json; one that is no object with both; a name or a number that `names` does
            not have; or a `cls` that is not the shape.
    """
    if "json" not in members:
        raise BadSample("missing key", "no .json")
    try:
        found = json.loads(members["json"])
    except (ValueError, RecursionError) as error:
        raise BadSample("label", f"the json cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise BadSample("label", f"the json is a {type(found).__name__}, not an object")
    shape, texture = (_class(found, cue, names) for cue in CUES)
    if "cls" in members and members["cls"].strip() != b"%d" % shape:
        raise BadSample("label", f"cls is {members['cls'][:20]!r}, the shape {shape}")
    return shape, texture


def _class(found: Mapping[str, Any], cue: str, names: Sequence[str]) -> int:
    if cue not in found:
        raise BadSample("missing key", f"no {cue!r} in the json")
    given = found[cue]
    if isinstance(given, str) and given in names:
        return names.index(given)
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(names):
        return given
    raise BadSample("label", f"{cue} is {given!r:.40}; classes.json has {len(names)} classes")


def sources_of(key: str) -> tuple[str, str] | None:
    """The pictures of shape and texture that Geirhos et al. name in a key, `cat3-dog2`.

    None for a key of another form.
    """
    found = _PAIR.fullmatch(key.rsplit("/", 1)[-1])
    return None if found is None else (found[1], found[2])


class CueExamples:
    """Decodes a sample into the central square of its image and the classes of its cues."""

    def __init__(self, view: EvalView, *, reads: Examples, names: Sequence[str]) -> None:
        self.view, self.reads, self.names = view, reads, tuple(names)

    def decode(self, members: Mapping[str, bytes], key: int) -> Cues:
        """One sample. Raises `BadSample` or `BadImage`."""
        shape, texture = cues_of(members, self.names)
        return Cues(self.view(self.reads.image(members)), shape, texture)

    def collate(self, items: list[Cues]) -> dict[str, Any]:
        """`views` {"clean": uint8 (1, B, 3, S, S)}, `label` (B,) the shapes, `texture` (B,)."""
        squares = torch.stack([item.square for item in items])[None]
        shapes, textures = (
            torch.tensor([getattr(item, cue) for item in items], dtype=torch.long) for cue in CUES
        )
        return {"views": {CLEAN: squares}, "label": shapes, "texture": textures}


class NamedShards(ImageShards):
    """Clean images of shards whose classes have names.

    Args:
        shards: patterns, as `ImageShards` takes them.
        option: what messages call them, e.g. `cue.train`.
        batch_size: images of a batch on one rank.
        workers: processes a rank that decode.
        seed: of the subset that a limit takes.
        images: sizes and normalisation.
        streaming: how shards are read.
    """

    def __init__(
        self,
        shards: Patterns,
        *,
        option: str,
        batch_size: int = 256,
        workers: int = 8,
        seed: int = 0,
        images: Images | None = None,
        streaming: Streaming | None = None,
    ) -> None:
        super().__init__(
            shards,
            batch_size=batch_size,
            workers=workers,
            seed=seed,
            images=images,
            streaming=streaming,
        )
        self.option = option

    @cached_property
    def names(self) -> list[str]:
        """The class of each label. Raises `UserError` unless `classes.json` has one name each."""
        names = classes_of(self.train_shards.urls)
        if names is None or len(set(names)) != len(names):
            what = "no classes.json" if names is None else "a classes.json with a name twice"
            raise UserError(
                f"{self.option}: {what} beside {self.train_shards.urls[0]}; write the list of the "
                "names of the classes, in the order of their numbers"
            )
        return names

    def _shards(self, split: Literal["train", "val"]) -> ShardSet:
        spec = self.patterns["train"]
        if not spec:
            raise UserError(f"{self.option} names no shards; give a pattern")
        return find_shards(spec, streaming=self.streaming, where=self.option)


class CueShards(NamedShards):
    """Cue-conflict images, each once over all ranks: `clean_dataloader("train")`."""

    def finish(self, batch: dict[str, Any]) -> CueBatch:
        """8-bit squares to a normalised view, on whatever device they are."""
        return {**super().finish(batch), "texture": batch["texture"]}

    def _clean_set(self, split: Literal["train", "val"], limit: int | None, start: int = 0) -> Any:
        shards = self.train_shards
        reads = Examples(min_side=self.images.min_side)
        adapter = CueExamples(self.clean_view, reads=reads, names=self.names)
        shared = {"layout": self._layout(start), "seed": self.seed, "streaming": self.streaming,
                  "decode": adapter.decode, "collate": adapter.collate, "limit": limit}  # fmt: skip
        if (index := shards.index) is None:
            return SequentialSweep(shards.urls, **shared)
        return ShardSweep(index, **shared)
