"""A backbone and clean images for the tests of everything that probes."""

import torch
from torch import nn

from contramask.models.backbone import Backbone
from contramask.probes.features import CLEAN
from contramask.types import Batch, Mask, Spec, Tokens, UserError

D, PATCH, GRID, CLASSES = 12, 4, (2, 3), 7
SIZE = (GRID[0] * PATCH, GRID[1] * PATCH)


class TinyBackbone(Backbone):
    """A patch embedding with all that training changes: batch norm, dropout, a class token."""

    def __init__(self, *, tokens: int = 2, seed: int = 0):
        super().__init__()
        self.spec = Spec(dim=D, patch=PATCH, grid=GRID, depth=1)
        self.config = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Conv2d(3, D, PATCH, stride=PATCH)
            self.norm = nn.BatchNorm1d(D)
            self.dropout = nn.Dropout(0.3)
            self.prefix = nn.Parameter(torch.randn(tokens, D))

    def forward(
        self,
        image: torch.Tensor,
        mask: Mask | None = None,
        fill: torch.Tensor | None = None,
        layers: tuple[int, ...] = (),
    ) -> Tokens:
        x = self.embed(image).flatten(2)  # (B, D, N)
        x = self.dropout(self.norm(x)).mT  # (B, N, D)
        return Tokens(self.prefix + x.mean(1, keepdim=True).sin(), x)


def images(labels: torch.Tensor, seed: int) -> torch.Tensor:
    """Noise with the label's colour, so that probes have something to find."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randn(CLASSES, 3, 1, 1, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(len(labels), 3, *SIZE, generator=generator)
    return noise + 1.5 * colours[labels.clamp(min=0)]


def batches(sizes: tuple[int, ...], *, seed: int = 0, unlabelled: int = 0) -> list[Batch]:
    """Clean batches of these sizes; the first `unlabelled` images have no label."""
    total = sum(sizes)
    y = torch.randint(CLASSES, (total,), generator=torch.Generator().manual_seed(seed))
    x = images(y, seed)
    y[:unlabelled] = -1
    parts = zip(x.split(list(sizes)), y.split(list(sizes)), strict=True)
    return [Batch(views={CLEAN: x[None]}, label=y, position=0) for x, y in parts]


class Loader:
    """Batches that Lightning takes for a loader; a list it would take for many."""

    def __init__(self, batches: list[Batch]):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class TinyData:
    """Clean images as a data module offers them, this rank's part of them."""

    def __init__(self, *, rank: int = 0, world: int = 1, val: bool = True, labels: bool = True):
        self.rank, self.world, self.val, self.labels = rank, world, val, labels

    def clean_dataloader(self, split: str, limit: int | None = None) -> Loader:
        if split == "val" and not self.val:
            raise UserError("data.val names no shards")
        sizes = {"train": (13, 13, 13, 1, 10), "val": (11, 6)}[split]
        found = batches(sizes, seed=len(split), unlabelled=0 if self.labels else sum(sizes))
        if limit is not None and limit < 10:
            found = found[-1:]
        return Loader(found[self.rank :: self.world])

    def to_device(self, batch: Batch, device: torch.device | str) -> Batch:
        return batch
