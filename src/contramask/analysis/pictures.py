"""What a network looks at, as pictures; its tokens as points in the plane."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from contramask.analysis.analysis import Analysis, Seen, Tap
from contramask.analysis.reading import Reading
from contramask.functional.attention import among_patches
from contramask.models.attention import Attended
from contramask.types import Spec

DARK = 0.12  # of the brightness of an image where nobody looks


class Pictures(Analysis):
    """Images, the attention to their patches in three blocks, and final tokens.

    The map of a picture is the attention of the class token, or of all patches in the mean where
    there is none, averaged over heads.

    Attributes:
        maps: block -> (images, rows, columns), each with sum 1.
        tokens: final tokens of patches, (images, patches, D).
        images_seen: normalised, (images, 3, H, W).
        label: of the images; -1 where unknown.

    Args:
        images: how many are kept; the first ones.
    """

    def __init__(self, *, images: int = 18):
        super().__init__()
        self.images = images
        self.maps: dict[str, Tensor] = {}
        self.tokens = self.images_seen = self.label = torch.empty(0)
        self._parts: list[tuple[dict[str, Tensor], Tensor, Tensor, Tensor]] = []

    def taps(self, spec: Spec) -> Mapping[str, Tap]:
        def look(attended: Attended, label: str) -> Float[Tensor, "B N"]:
            prefix = attended.maps.shape[-1] - spec.patches
            if prefix:
                seen = attended.maps[:, :, 0, prefix:].mean(1)
            else:
                seen = among_patches(attended.maps, 0).mean((1, 2))
            return seen / seen.sum(-1, keepdim=True)

        shown = dict.fromkeys((0, (spec.depth - 1) // 2, spec.depth - 1))
        return {
            **{f"block_{i:02d}": Tap("attention", f"block_{i:02d}", look) for i in shown},
            "tokens": Tap("tokens", "*", lambda tokens, label: tokens.patch.float()),
        }

    def update(self, seen: Seen) -> None:
        maps = {
            layer: value.unflatten(1, seen.spec.grid).cpu()
            for tap, layers in seen.found.items()
            if tap != "tokens"
            for layer, value in layers.items()
        }
        tokens = seen.found["tokens"]["final"].cpu()
        self._parts.append((maps, tokens, seen.images.cpu(), seen.label.cpu()))

    def reset(self) -> None:
        super().reset()
        self._parts = []

    def readings(self) -> list[Reading]:
        """Nothing: what was seen is for the eye."""
        n = self.images
        maps, tokens, images, labels = zip(*self._parts, strict=True)
        self.maps = {name: torch.cat([m[name] for m in maps])[:n] for name in maps[0]}
        self.tokens, self.images_seen = torch.cat(tokens)[:n], torch.cat(images)[:n]
        self.label = torch.cat(labels)[:n]
        return []

    def shown(
        self, count: int, mean: Sequence[float], std: Sequence[float]
    ) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
        """`image_0`, `image_0/attention_block_11`, ...: images, lit where attention is.

        Args:
            count: how many images.
            mean: what was subtracted from the pixels.
            std: what they were divided by.
        """
        shape = (3, 1, 1)
        images = self.images_seen[:count].float()
        images = images * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
        images = images.clamp(0, 1)
        found = {}
        for i, image in enumerate(images):
            found[f"image_{i}"] = _pixels(image)
            for name, maps in self.maps.items():
                light = maps[i] / maps[i].max().clamp(min=1e-12)
                light = interpolate(light[None, None], image.shape[1:], mode="bilinear")[0]
                found[f"image_{i}/attention_{name}"] = _pixels(image * (DARK + (1 - DARK) * light))
        return found


def _pixels(image: Float[Tensor, "3 H W"]) -> UInt8[np.ndarray, "H W 3"]:
    pixels: Any = (image.nan_to_num(0.0) * 255).round().byte().permute(1, 2, 0)
    return pixels.numpy()
