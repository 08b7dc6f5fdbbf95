"""Views: named groups of crops of one image, a function of (image, key, name, number of the crop).

An image is decoded once for all its crops, and not larger than the finest of them needs. Crops
travel as 8-bit numbers beside the parameters of their photometric augmentation, which the device
applies in batch; without an accelerator the worker applies the same parameters with OpenCV.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from contramask.data import geometry, photometric, photometric_host
from contramask.data.crops import Crops, Plan, check_windows
from contramask.data.decode import open_picture
from contramask.data.geometry import Interpolation
from contramask.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# A JPEG is decoded smaller only if every crop still has this many times its final pixels a side:
# the rest of the way is then done by the antialiased resize, and no difference is seen.
OVERSAMPLING = 2.0

Triple = tuple[float, float, float]


class Example(NamedTuple):
    """The views of one image."""

    crops: dict[str, UInt8[Tensor, "V 3 H W"]]
    photometric: dict[str, Float[Tensor, "V P"]]  # see `photometric.FIELDS`


class Views:
    """Makes the views of an image in a worker, and finishes those of a batch on its device.

    Args:
        groups: the views by name. Raises `UserError` if one shares boxes that are not there.
        on_device: whether `finish` applies the photometric augmentation (an accelerator) or the
            workers do (none).
        mean: subtracted from the channels, in [0, 1]; (0, 0, 0) with std (1, 1, 1) leaves [0, 1].
        std: what the channels are divided by.
    """

    def __init__(
        self, groups: Mapping[str, Crops], *, on_device: bool, mean: Triple, std: Triple
    ) -> None:
        check_windows(groups)
        self.groups = dict(groups)
        self.on_device = on_device
        self.mean = mean
        self.std = std

    def __call__(self, data: bytes, key: int) -> Example:
        """The views of an encoded image. Raises `BadImage`.

        The random numbers of a crop are a function of (key, name of the view, number of the crop).
        """
        picture = open_picture(data)
        plans = {name: self._plan(name, key, picture.height, picture.width) for name in self.groups}
        image = picture.pixels(reduce=self._reduce(plans), lent=True)
        factor = round(picture.height / image.shape[0])
        crops = {name: self._crops(name, plan, image, factor) for name, plan in plans.items()}
        rows = {
            name: torch.tensor([row for _, row in plan], dtype=torch.float32)
            for name, plan in plans.items()
        }
        return Example(crops, rows)

    def collate(
        self, examples: Sequence[Example]
    ) -> tuple[dict[str, UInt8[Tensor, "V B 3 H W"]], dict[str, Float[Tensor, "V B P"]]]:
        """The views of a batch, crop-major, and their photometric parameters."""
        crops = {n: torch.stack([e.crops[n] for e in examples], dim=1) for n in self.groups}
        rows = {n: torch.stack([e.photometric[n] for e in examples], dim=1) for n in self.groups}
        return crops, rows

    def finish(
        self, views: Mapping[str, Tensor], rows: Mapping[str, Tensor]
    ) -> dict[str, Float[Tensor, "V B 3 H W"]]:
        """Photometric augmentation, if it is done on the device, and normalisation."""
        finished = {}
        for name, crops in views.items():
            group = self.groups[name]
            if not (self.on_device and group.photometric):
                finished[name] = normalise(crops, self.mean, self.std)
                continue
            parts = []
            for v in range(group.number):
                config = group.photometric_of(v)
                assert config is not None
                image = photometric.apply(crops[v], rows[name][v], config)
                parts.append(_affine(image, self.mean, self.std, 1.0))
            finished[name] = torch.stack(parts)
        return finished

    def _plan(self, name: str, key: int, height: int, width: int) -> Plan:
        group, shared = self.groups[name], None
        if group.window is not None and group.window.of is not None:
            of = group.window.of
            shared = self.groups[of].plan(of, key, height, width)
        return group.plan(name, key, height, width, shared=shared)

    def _reduce(self, plans: Mapping[str, Plan]) -> int:
        """How many times smaller the image may be decoded."""
        spare = min(
            min(box.height, box.width) / self.groups[name].resized
            for name, plan in plans.items()
            for box, _ in plan
        )
        return next((r for r in (8, 4, 2) if spare / r >= OVERSAMPLING), 1)

    def _crops(
        self,
        name: str,
        plan: Plan,
        image: UInt8[np.ndarray, "H W 3"],
        factor: int,
    ) -> UInt8[Tensor, "V 3 S S"]:
        group = self.groups[name]
        out = np.empty((group.number, 3, group.size, group.size), np.uint8)
        for v, (box, row) in enumerate(plan):
            if factor > 1:
                box = geometry.shrunk(box, factor, *image.shape[:2])
            crop = geometry.cut(image, box, size=group.resized, interpolation=group.interpolation)
            if box.corner is not None:
                rows, columns = (slice(at, at + group.size) for at in box.corner)
                crop = np.ascontiguousarray(crop[rows, columns])
            if not self.on_device and group.photometric:
                crop = photometric_host.apply(crop, row)
            cv2.split(crop, list(out[v]))
        return torch.from_numpy(out)


class EvalView:
    """The central square of an image: the shorter side to `resize` pixels, then size x size.

    Args:
        size: pixels a side of the result.
        resize: the shorter side before the cut; by default 8/7 of `size` (256 for 224), as in
            every evaluation on ImageNet. Small pictures take `resize` = `size`.
        interpolation: of the resize, which is antialiased.
        mean: as in `Views`.
        std: as in `Views`.
    """

    def __init__(
        self,
        size: int,
        *,
        resize: int | None = None,
        interpolation: Interpolation = "bicubic",
        mean: Triple,
        std: Triple,
    ) -> None:
        self.size = size
        self.shorter = round(size * 8 / 7) if resize is None else resize
        self.interpolation: Interpolation = interpolation
        self.mean = mean
        self.std = std
        if self.shorter < size:
            raise UserError(
                f"evaluation view: resize is {resize} and size {size}; resize is at least size; "
                "set resize in the data's evaluation view"
            )

    def __call__(self, data: bytes) -> UInt8[Tensor, "3 S S"]:
        """The central square of an encoded image. Raises `BadImage`."""
        image = open_picture(data).pixels(lent=True)
        height, width = image.shape[:2]
        short = min(height, width)
        if max(height, width) > 8 * short:  # a strip: it would grow without bound
            top, left = ((n - min(n, 8 * short)) // 2 for n in (height, width))
            image = image[top : height - top, left : width - left]
            height, width = image.shape[:2]
        height, width = (int(self.shorter * n / short) for n in (height, width))
        image = geometry.resize(image, height, width, self.interpolation)
        top, left = (round((n - self.size) / 2) for n in (height, width))
        image = image[top : top + self.size, left : left + self.size]
        return torch.from_numpy(image.transpose(2, 0, 1).copy())

    def normalise(self, images: UInt8[Tensor, "*B 3 S S"]) -> Float[Tensor, "*B 3 S S"]:
        """(image / 255 - mean) / std."""
        return normalise(images, self.mean, self.std)


def normalise(
    images: UInt8[Tensor, "*B 3 H W"], mean: Triple, std: Triple
) -> Float[Tensor, "*B 3 H W"]:
    """(image / 255 - mean) / std."""
    return _affine(images.float(), mean, std, 255.0)


def _affine(x: Tensor, mean: Triple, std: Triple, top: float) -> Tensor:
    """(x / top - mean) / std, in place: x is our own."""
    scale = photometric.constant(tuple(1 / (top * s) for s in std), x.device)
    shift = photometric.constant(tuple(-m / s for m, s in zip(mean, std, strict=True)), x.device)
    return x.mul_(scale[:, None, None]).add_(shift[:, None, None])
