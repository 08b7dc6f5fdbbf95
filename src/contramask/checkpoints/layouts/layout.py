"""What a layout says: where a network is in a file, and what its tensors are called there."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from contramask.models.positions import Interpolation

Net = Literal["student", "teacher"]
State = dict[str, Tensor]
NETS: tuple[Net, Net] = ("student", "teacher")

MARK = "patch_embed.proj.weight"  # every ViT of these codes has it, whatever stands before

# Heads do not show in shapes. These are the published sizes: width -> heads.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def under(name: str, parts: Iterable[str]) -> bool:
    """Whether a name is one of `parts`, or inside one that ends with a dot."""
    return any(name == part or (part[-1] == "." and name.startswith(part)) for part in parts)


def unchanged(state: State) -> State:
    """Names are timm's already."""
    return state


@dataclass(frozen=True)
class Layout:
    """How one family of official codes writes a backbone.

    Attributes:
        name: what --layout calls it.
        holds: whether a file's tensors look like it.
        student: prefixes of the network that is trained, the first that is there counts.
        teacher: those of its average.
        prefer: which one the authors publish.
        inside: names in the network that are no part of a backbone: heads, mask tokens.
        beside: names in the file that are no part of the network: decoders, losses.
        rename: to timm's names, with relative positions under `bias.`.
        heads: by width.
        interpolation: how the authors resize positions.
    """

    name: str
    holds: Callable[[State], bool]
    student: tuple[str, ...] = ("",)
    teacher: tuple[str, ...] = ()
    prefer: Net = "student"
    inside: tuple[str, ...] = ("head.", "head_dist.", "pre_logits.")
    beside: tuple[str, ...] = ()
    rename: Callable[[State], State] = unchanged
    mark: str = MARK
    heads: Mapping[int, int] = field(default_factory=lambda: HEADS)
    interpolation: Interpolation = "antialias"

    def root(self, tensors: State, net: Net) -> str | None:
        """The prefix of a network; None: the file has none."""
        places = self.student if net == "student" else self.teacher
        return next((p for p in places if p + self.mark in tensors), None)
