"""What fine-tuning does to images and labels, by timm: RandAugment, erasing, mixup, cutmix.

timm draws from the global generators of Python, NumPy and torch. Here each draw is made inside
`drawn`, which seeds them by the place and gives them back as they were, so that an augmentation is
a function of (seed, position) and nothing else notices.
"""

import random
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageOps
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from contramask.data.augmentation import Augment
from contramask.data.geometry import Interpolation
from contramask.errors import UserError
from contramask.types import fold

_PIL = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@contextmanager
def drawn(seed: int, device: torch.device | None = None) -> Generator[None]:
    """Inside, the global generators are functions of `seed`; afterwards they are as before.

    Args:
        seed: of Python's, NumPy's and, where `device` is given, torch's generators.
        device: whose generator of torch is used besides the CPU's; None: torch is left alone.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  timm's own
    cuda = [device] if device is not None and device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda, enabled=device is not None):
            reseed(seed, device)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def reseed(seed: int, device: torch.device | None = None) -> None:
    """Begin another draw inside `drawn`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    if device is not None:
        torch.random.default_generator.manual_seed(seed)  # pyright: ignore
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep so many bits of each channel; without any the image is black.

    timm asks for 0 bits at the greatest magnitude, which Pillow refuses from 13.0 on: one image in
    700 of the usual `rand-m9-mstd0.5-inc1` would end the training.
    """
    if bits < 1:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, min(bits, 8))


class RandAugment:
    """timm's RandAugment on crops of 8 bits, in a worker.

    Args:
        name: e.g. `rand-m9-mstd0.5-inc1`: magnitude 9, its standard deviation 0.5, operations that
            grow stronger with the magnitude; two operations, each done with probability 0.5.
        size: pixels a side of the crops: translations are up to 0.45 of it.
        mean: of the channels in [0, 1]: what rotations and shears leave empty is filled with it.
        interpolation: of rotations and shears.

    Raises:
        UserError: timm knows no such RandAugment.
    """

    def __init__(
        self,
        name: str,
        *,
        size: int,
        mean: tuple[float, float, float],
        interpolation: Interpolation,
    ):
        fill = tuple(min(255, round(255 * x)) for x in mean)
        settings = {"translate_const": int(size * 0.45), "img_mean": fill}
        settings["interpolation"] = _PIL[interpolation]
        try:
            self.change = rand_augment_transform(name, settings)
            for operation in self.change.ops:
                if operation.name.startswith("Posterize"):
                    operation.aug_fn = posterize
        except (AssertionError, ValueError, KeyError) as error:
            raise UserError(
                f"data.augment.randaugment is {name!r}, which timm does not know "
                f"({str(error) or type(error).__name__}); it is like rand-m9-mstd0.5-inc1, or null"
            ) from error

    def __call__(self, crop: UInt8[Tensor, "3 H W"], seed: int) -> UInt8[Tensor, "3 H W"]:
        """The crop, augmented: a function of it and the seed."""
        image = Image.fromarray(np.ascontiguousarray(crop.numpy().transpose(1, 2, 0)))
        with drawn(seed):
            image = self.change(image)
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


class BatchAugment:
    """Erasing, mixing and smoothing of a normalised batch on its device.

    Erasing is drawn for each image by its place in the stream. Mixing pairs image i of a
    micro-batch of B with B - 1 - i, so it is drawn for each micro-batch: every rank mixes its own
    images by draws of its own, and two ranks are another training than one. That is timm's mixup.

    Args:
        augment: what is done.
        classes: how many there are.
        seed: of all draws.
    """

    def __init__(self, augment: Augment, classes: int, *, seed: int):
        self.augment, self.classes, self.seed = augment, classes, seed
        self.mixup = Mixup(
            mixup_alpha=augment.mixup,
            cutmix_alpha=augment.cutmix,
            prob=augment.mix,
            switch_prob=augment.switch,
            mode=augment.mode,
            label_smoothing=augment.smoothing,
            num_classes=classes,
        )

    def __call__(
        self, images: Float[Tensor, "B 3 H W"], labels: Int[Tensor, " B"], position: int
    ) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, "B C"]]:
        """Images, changed in place, and the distribution over classes that each shall get.

        Args:
            images: of a micro-batch.
            labels: theirs.
            position: of the first one in the stream.

        Raises:
            UserError: an odd number of images cannot be mixed in pairs.
        """
        self._erase(images, position)
        if not self.augment.mixes:
            return images, mixup_target(labels, self.classes, 1.0, self.augment.smoothing)
        if len(images) % 2:
            raise UserError(
                f"mixup and cutmix pair the images of a micro-batch, which has {len(images)}; set "
                "data.batch_size to an even number"
            )
        with drawn(fold(self.seed, "mix", position)):
            return self.mixup(images, labels)

    def _erase(self, images: Tensor, position: int) -> None:
        augment = self.augment
        if not augment.erasing:
            return
        erase = RandomErasing(
            augment.erasing,
            mode=augment.erasing_mode,
            max_count=augment.erasing_count,
            device=str(images.device),
        )
        with drawn(0, images.device):
            for i, image in enumerate(images):
                reseed(fold(self.seed, "erase", position + i), images.device)
                erase(image)
