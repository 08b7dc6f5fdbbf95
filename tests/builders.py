"""Small things that tests build: sizes, a backbone, a stream, recipes. All dimensions differ."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch

from contramask.masks import (
    BlockMasking,
    MultiblockMasking,
    RandomMasking,
    StratifiedBlockMasking,
    UnitMasking,
    VariedBlockMasking,
)
from contramask.models.ema import EmaCopy
from contramask.models.tokenizers.patches import PatchTokenizer
from contramask.models.vit import VisionTransformer
from contramask.objectives.beit import BEiT
from contramask.objectives.cmae import CMAEContrast
from contramask.objectives.dino import DINO
from contramask.objectives.ibot import IBOT
from contramask.objectives.ijepa import IJEPA
from contramask.objectives.koleo import KoLeo
from contramask.objectives.mae import MAE
from contramask.objectives.maskfeat import MaskFeat
from contramask.objectives.moco import MoCoV3
from contramask.objectives.simclr import SimCLR
from contramask.objectives.simmim import SimMIM
from contramask.optim import Optim, Rule
from contramask.schedule import Schedule
from contramask.training.pretraining import Pretraining
from contramask.types import Batch, Spec

SPEC = Spec(dim=24, patch=4, grid=(4, 5), depth=2)
SIZE = (16, 20)
RATE = Schedule(peak=1e-3, warmup=0.2)


def tiny_vit(name: str = "vit_tiny_patch16_224", *, seed: int = 0, **changes: Any):
    """A ViT of `SPEC`; `timm={...}` adds to its arguments."""
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3} | changes.pop("timm", {})
    torch.manual_seed(seed)
    return VisionTransformer(name, **{"img_size": SIZE, "patch_size": 4, "timm": sizes} | changes)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(*shape: int, seed: int = 0) -> torch.Tensor:
    """Uniform in [-1, 1], in steps of 1/128: the same on every processor, to the last bit."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 129, shape, generator=generator) / 128


class ToyStream:
    """An endless stream that is a function of position: it starts where the trainer stands."""

    def __init__(self, batch: int = 4, *, late: int = 0, dtype: torch.dtype = torch.float32):
        self.batch, self.late, self.dtype = batch, late, dtype
        self.trainer: pl.Trainer | None = None

    def __iter__(self) -> Iterator[Batch]:
        t = self.trainer
        assert t is not None
        micro = t.global_step * t.accumulate_grad_batches + self.late
        while True:
            start = (micro * t.world_size + t.global_rank) * self.batch
            yield toy_batch(start, self.batch, self.dtype)
            micro += 1


def toy_batch(position: int, batch: int, dtype: torch.dtype = torch.float32) -> Batch:
    """Every image is a function of its own place, whatever batch it is in."""

    def crops(number: int, name: int, size: tuple[int, int] = SIZE) -> torch.Tensor:
        drawn = [exact(number, 3, *size, seed=2 * (position + i) + name) for i in range(batch)]
        return 2 * torch.stack(drawn, 1).to(dtype)  # (V, B, 3, H, W)

    return Batch(
        views={
            "global": crops(2, 0),
            "mild": crops(1, 1),
            "local": crops(3, 10**6, (8, 12)),
            "shifted": crops(1, 2 * 10**6),
        },
        label=torch.full((batch,), -1),
        position=position,
    )


def beit(spec: Spec, *, mask: str) -> BEiT:
    """With a tokenizer of its own, since precision goes along; a word is 2 x 2 pixels."""
    tokenizer = PatchTokenizer((1 + exact(13, 12, seed=5)) / 2)
    return BEiT(spec, mask=mask, vocabulary=13, tokenizer=tokenizer)


MASKED: dict[str, Any] = {
    "mae": partial(MAE, mask="random", dim=16, depth=1, heads=2),
    "simmim": partial(SimMIM, mask="units"),
    "maskfeat": partial(MaskFeat, mask="blocks", cell=2, window=4),
    "beit": partial(beit, mask="blocks"),
    "ijepa": partial(IJEPA, mask="multiblock", dim=16, depth=1, heads=2),
}
MASKS: dict[str, Any] = {
    "random": RandomMasking,
    "units": partial(UnitMasking, unit=4),
    "varied": partial(VariedBlockMasking, whole=0.3),
    "stratified": StratifiedBlockMasking,
    "blocks": partial(BlockMasking, count=9, smallest=3),
    "multiblock": partial(MultiblockMasking, least=2, reach=True),
}
PROTOTYPES = {"hidden": 32, "bottleneck": 6, "out": 10}
RECIPES: dict[str, dict[str, Any]] = {
    "dino": {"distil": partial(DINO, **PROTOTYPES, norm_last_layer=False)},
    "ibot": {"distil": partial(IBOT, mask="varied", patch_out=14, sharing="split", **PROTOTYPES)},
    "dinov2": {
        "distil": partial(
            IBOT, mask="stratified", sharing="separate", targets="sinkhorn", **PROTOTYPES
        ),
        "spread": partial(KoLeo, mask="stratified"),
    },
    "moco": {"contrast": partial(MoCoV3, hidden=32, out=8)},
    "simclr": {"contrast": partial(SimCLR, hidden=32, out=8)},
    "mae": {"masked": MASKED["mae"]},
    "simmim": {"masked": MASKED["simmim"]},
    "maskfeat": {"masked": MASKED["maskfeat"]},
    "beit": {"masked": MASKED["beit"]},
    "ijepa": {"masked": MASKED["ijepa"]},
    "cmae": {
        "contrast": partial(
            CMAEContrast, mask="random", hidden=32, out=8, dim=16, depth=1, heads=2
        ),
        "masked": MASKED["mae"],
    },
    "hybrid": {"contrast": partial(MoCoV3, hidden=32, out=8), "masked": MASKED["simmim"]},
    "hybrid_shared": {
        "contrast": partial(MoCoV3, hidden=32, out=8, mask="units"),
        "masked": partial(SimMIM, mask="units", view="global"),
    },
    "hybrid_layered": {
        "contrast": partial(MoCoV3, hidden=32, out=8, mask="units"),
        "masked": partial(SimMIM, mask="units", view="global", layer=0),
    },
}


def pretraining(recipe: str = "hybrid", *, drop_path: float = 0.0, **changes: Any) -> Pretraining:
    """A recipe on the tiny ViT."""
    backbone = tiny_vit(timm={"drop_path_rate": drop_path})
    objectives = RECIPES[recipe]
    used = {m.keywords["mask"] for m in objectives.values() if "mask" in m.keywords}
    defaults = {
        "masks": {name: MASKS[name] for name in sorted(used)},
        "optim": Optim(lr=RATE, batch=None, clip=1.0, rules=[Rule(ndim=1, decay=0.0)]),
        "momentum": Schedule(peak=0.9, end=1.0),
    }
    return Pretraining(backbone, objectives, **defaults | changes)


def known(module: Pretraining) -> Pretraining:
    """Weights that no processor rounds differently, in double precision.

    Batch norm over a few images turns the last bit of float32 into the fifth digit of the loss.
    """
    for i, (name, parameter) in enumerate(sorted(module.named_parameters())):
        if parameter.requires_grad and (parameter.ndim > 1 or name.endswith(".fill")):
            scale = 2.0 ** -round(math.log2(parameter[0].numel()) / 2)
            parameter.data.copy_(scale * exact(*parameter.shape, seed=i))
    for teacher in module.modules():
        if isinstance(teacher, EmaCopy):
            teacher.update(0.0)
    return module.double()


def fit(
    module: Pretraining,
    *,
    steps: int = 3,
    stream: ToyStream | None = None,
    ckpt: Any = None,
    **options: Any,
) -> pl.Trainer:
    """Train on the toy stream, with nothing beside."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options = {**quiet, "enable_model_summary": False, "accelerator": "cpu", **options}
    trainer = pl.Trainer(max_steps=steps, **options)
    stream = stream or ToyStream()
    stream.trainer = trainer
    trainer.fit(module, stream, ckpt_path=ckpt)
    return trainer


class Losses(pl.Callback):
    """What `training_step` returned, micro-batch by micro-batch."""

    def __init__(self):
        self.total: list[float] = []
        self.terms: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.terms.append({k: v.item() for k, v in outputs["losses"].items()})
        # Lightning divides what it minimises by the number of accumulated micro-batches.
        self.total.append(outputs["loss"].item())


class StopAt(pl.Callback):
    """Stop after a number of weight updates, as a signal would."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            trainer.should_stop = True
