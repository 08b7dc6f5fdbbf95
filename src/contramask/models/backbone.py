"""What every backbone promises: images in, tokens out."""

from abc import ABC, abstractmethod
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from contramask.types import Mask, Spec, Tokens


class Backbone(nn.Module, ABC):
    """An encoder of images into tokens.

    Attributes:
        spec: its sizes, all that heads, masks and losses may know.
        config: the constructor's arguments as plain values, enough to build it again.
    """

    spec: Spec
    config: dict[str, Any]

    def timm_sheet(self) -> dict[str, Any] | None:
        """`name` and `arguments` of `timm.create_model` for the same network, if timm has it."""
        return None

    def sites(self) -> dict[str, nn.Module]:
        """Modules whose input and output analyses may read, by names such as `blocks.3.mlp`."""
        return {name: module for name, module in self.named_modules() if name}

    def attentions(self) -> list[nn.Module]:
        """The attention of every block, in a form that `attend` takes; empty: it has none."""
        return []

    def normed(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The last norm, over tokens of any block; without one they stay as they are."""
        return tokens

    @abstractmethod
    def forward(
        self,
        image: Float[Tensor, "B 3 H W"],
        mask: Mask | None = None,
        fill: Float[Tensor, " D"] | None = None,
        layers: tuple[int, ...] = (),
    ) -> Tokens:
        """Encode. Hidden patches become `fill`; with no `fill` they are dropped.

        Args:
            image: normalised images, H and W multiples of the patch.
            mask: which patches the encoder does not see; None: it sees all.
            fill: what stands in the place of a hidden patch.
            layers: blocks (0-based) whose un-normed outputs are wanted in `Tokens.layers`.
        """
