"""Checkpoint files of other codes, in small: a ViT of timm under the names they use."""

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from contramask.checkpoints.architecture import Wishes
from contramask.checkpoints.importing import Imported, import_backbone
from contramask.models.backbone import Backbone
from tests.builders import randn

HEADS = Wishes(heads=3)
SIZES = {"embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 0}
IMAGE = randn(2, 3, 32, 32)


def vit(name: str = "vit_tiny_patch16_224", seed: int = 0, **changes: Any):
    """A network of timm, 32 pixels by patches of 8, with every parameter moved."""
    arguments = {"img_size": 32, "patch_size": 8, **SIZES, "global_pool": "token", **changes}
    model = timm.create_model(name, **arguments).eval()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(0.1 * randn(*parameter.shape, seed=100 * seed + i))
    return model


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def imported(path: Path, content: Any, wishes: Wishes = HEADS, **options: Any) -> Imported:
    torch.save(content, path / "file.pth")
    return import_backbone(path / "file.pth", wishes=wishes, **options)


def joined(backbone: Backbone, image: Tensor = IMAGE) -> Tensor:
    tokens = backbone.eval()(image)
    return torch.cat([tokens.prefix, tokens.patch], 1)


def assert_same(backbone: Backbone, expected: Tensor) -> None:
    torch.testing.assert_close(joined(backbone), expected, atol=5e-6, rtol=0)
