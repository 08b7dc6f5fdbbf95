"""The nouns of the house: what travels between data, networks, objectives and probes.

A *view* is a named group of crops; a *mask* a named way of hiding patches; a *pass* is
(view, mask, network); *tokens* are what a pass yields; an *objective* maps tokens to a scalar.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, NotRequired, TypedDict

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from contramask.errors import UserError as UserError


class Batch(TypedDict):
    """One micro-batch of B images, as objectives see it (after the transfer to the device).

    `views[name]` is crop-major, (V, B, 3, H, W): V crops of each of B images, normalised floats.
    `position` is the place of the first image in the endless stream of training images, counted
    over all ranks; the step, the masks and every random draw are functions of it.
    """

    views: dict[str, Float[Tensor, "V B 3 H W"] | UInt8[Tensor, "V B 3 H W"]]
    label: Int[Tensor, " B"]  # -1 where unknown
    position: int
    keys: NotRequired[list[str]]  # the samples' names in their shards
    photometric: NotRequired[dict[str, Tensor]]  # drawn on the host, applied on the device


@dataclass(frozen=True)
class Spec:
    """The sizes of a backbone: all that a head, a mask or a loss may know of it."""

    dim: int
    patch: int
    grid: tuple[int, int]  # rows, columns of patches at the training resolution
    depth: int

    @property
    def patches(self) -> int:
        """How many patches an image has, without class token and registers."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Pass:
    """One forward of one network over one view. Equal passes are computed once.

    `layers` asks for the outputs of intermediate blocks (0-based, after the block, un-normed).
    """

    view: str
    mask: str | None = None
    net: Literal["student", "teacher"] = "student"
    layers: tuple[int, ...] = ()

    def __str__(self) -> str:
        parts = [self.net, self.view]
        if self.mask:
            parts.append(f"masked by {self.mask}")
        if self.layers:
            parts.append(f"with blocks {','.join(map(str, self.layers))}")
        return " · ".join(parts)


class Mask(NamedTuple):
    """Which patches are hidden, in patch space: class token and registers are not counted."""

    hidden: Bool[Tensor, "B N"]  # patches the encoder does not see
    targets: Bool[Tensor, "B T N"]  # patches to predict, in T blocks (MAE: T = 1, the hidden ones)
    visible: int | None = None  # patches each image keeps; None where it varies (then: no dropping)

    def kept(self) -> Int[Tensor, "B n"]:
        """Where the visible patches are, in grid order."""
        if self.visible is None:
            raise ValueError("images keep different numbers of patches: give the mask a fill")
        return self.hidden.to(torch.uint8).argsort(dim=1, stable=True)[:, : self.visible]


class Tokens(NamedTuple):
    """What a pass yields, after the final norm."""

    prefix: Float[Tensor, "B R D"]  # class token first, then registers
    patch: Float[Tensor, "B n D"]  # n = N, or only the visible ones, in grid order
    mask: Mask | None = None
    layers: dict[int, Float[Tensor, "B m D"]] = {}  # noqa: RUF012  block -> prefix and patches

    @property
    def cls(self) -> Float[Tensor, "B D"]:
        """The class token. Raises `UserError` if the backbone has none."""
        if self.prefix.shape[1] == 0:
            raise UserError(
                "the objective or probe reads the class token, this backbone has none; choose "
                "another model at model.backbone.init_args.name, or features of the patches"
            )
        return self.prefix[:, 0]


class Loss(NamedTuple):
    """A term of the loss.

    Computing one changes nothing: what an objective remembers (a centre) is handed out as `state`,
    and whoever trains writes it into the buffers of these names.
    """

    value: Float[Tensor, ""]  # what is minimised
    logs: dict[str, Tensor]  # what is shown; detached
    state: dict[str, Tensor] = {}  # noqa: RUF012  buffers of the objective after this micro-batch


def fold(*place: int | str) -> int:
    """A 63-bit seed that is a function of a place, e.g. `fold(seed, step, "mask")`."""
    text = "\x1f".join(map(str, place)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class Step:
    """Where training is. Randomness is a function of the place, never of the past.

    The place of a micro-batch is the row of its first image in the global batch of this update:
    `row = accumulated * world * B + rank * B` of `rows = accumulation * world * B`. Draws made
    through `rand` belong to rows, so they do not change when the same global batch is spread over
    another number of ranks or micro-batches.
    """

    index: int  # weight updates done so far
    progress: float  # fraction of training done, in [0, 1]
    seed: int = 0
    row: int = 0
    rows: int = field(default=0)  # 0: the micro-batch is the whole batch

    def generator(self, name: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator for this micro-batch and name alone."""
        return torch.Generator(device).manual_seed(fold(self.seed, self.index, self.row, name))

    def rand(
        self, name: str, batch: int, *shape: int, device: torch.device | str = "cpu"
    ) -> Float[Tensor, "B ..."]:
        """Uniform numbers in [0, 1), (batch, *shape): the rows of this micro-batch's images.

        The whole global batch is drawn and cut: for 4096 x 196 numbers that costs 5 ms on a CPU
        core and less than 0.1 ms on a GPU, and buys masks that do not depend on the world size.
        """
        generator = torch.Generator(device).manual_seed(fold(self.seed, self.index, name))
        rows = max(self.rows, self.row + batch)
        table = torch.rand((rows, *shape), generator=generator, device=device)
        return table[self.row : self.row + batch]
