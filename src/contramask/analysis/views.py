"""Other views of the probe images: a function of the image's name, the same for every model."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from contramask.types import UserError, fold

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)  # of a crop: share of the area, width : height


def transform(
    view: str, images: Float[Tensor, "B 3 H W"], keys: Sequence[str]
) -> Float[Tensor, "B 3 H W"]:
    """`plain`; `flip`, left to right; `crop_0`, `crop_1`, ...: a random crop, at times flipped.

    A crop has 20 to 100 % of the area and is resized to the whole, as in contrastive training
    (arXiv:2002.05709) without its colours; where it lies is drawn from the image's key.

    Raises:
        UserError: for another name.
    """
    if view == "plain":
        return images
    if view == "flip":
        return images.flip(-1)
    if not view.startswith("crop_"):
        raise UserError(f"analysis: no view {view!r}; there are plain, flip and crop_0, crop_1 ...")
    return torch.stack([_crop(x, fold(view, key)) for x, key in zip(images, keys, strict=True)])


def _crop(image: Float[Tensor, "3 H W"], seed: int) -> Float[Tensor, "3 H W"]:
    height, width = image.shape[1:]
    area, ratio, down, right, flip = torch.rand(
        5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).tolist()
    area = SCALE[0] + area * (SCALE[1] - SCALE[0])
    ratio = RATIO[0] * (RATIO[1] / RATIO[0]) ** ratio  # uniform in its logarithm
    h = min(height, max(1, round(height * (area / ratio) ** 0.5)))
    w = min(width, max(1, round(width * (area * ratio) ** 0.5)))
    top, left = int(down * (height - h + 1)), int(right * (width - w + 1))
    crop = vision.resized_crop(image, top, left, h, w, [height, width], antialias=True)
    return crop.flip(-1) if flip < 0.5 else crop
