"""What each of two processes does; the results come back as tensors in a file per rank."""

import os
import socket
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from contramask.analysis.cka import compare
from contramask.analysis.grams import Grams
from contramask.analysis.run import analyse
from contramask.analysis.suite import NAMES, Settings, suite
from contramask.distributed import alone as everyone_for_himself
from contramask.distributed import (
    gather,
    gather_with_gradient,
    largest,
    mean,
    rank,
    total,
    world,
)
from contramask.functional.distil import sinkhorn
from contramask.models.ema import EmaCopy
from contramask.objectives.moco import MoCoV3
from contramask.objectives.objective import Objective
from contramask.objectives.simclr import SimCLR
from contramask.types import Batch, Spec, Step, Tokens
from tests.builders import (
    RECIPES,
    SIZE,
    ToyStream,
    fit,
    known,
    pretraining,
    randn,
    tiny_vit,
)
from tests.training import tuned

IMAGES = 6  # of the global batch
RESULT = dict[str, Any]


def run_two(folder: Path) -> list[RESULT]:
    """Two gloo processes on this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(_process, (port, str(folder)), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"{i}.pt", weights_only=True) for i in range(2)]


def _process(index: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {k: str(v) for k, v in place.items()}
    # As torchrun would: Lightning then starts no processes of its own.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}
    dist.init_process_group("gloo")
    found = {**primitives(), **losses(), **trainings(), **analyses()}
    found["finetuning"] = tuned.trained(2, strategy="ddp", devices=2)
    torch.save(found, Path(folder) / f"{index}.pt")
    dist.barrier()
    dist.destroy_process_group()


def primitives() -> RESULT:
    """The functions of `contramask.distributed`, on rows that say whose they are."""
    mine = torch.arange(6.0).reshape(2, 3) + 10 * rank()
    x, beside = mine.clone().requires_grad_(), torch.zeros(2 * world(), 3, requires_grad=True)
    weight = torch.arange(6.0 * world()).reshape(-1, 3) * (rank() + 1)
    older = 1.0 * beside  # made before the gather, hence reached after it on the way back
    ((gather_with_gradient(x) + older) * weight).sum().backward()
    return {
        "world": world(),
        "gather": gather(mine),
        "gathered": gather_with_gradient(mine),
        "gradient": x.grad,
        "beside": beside.grad,
        "mean": mean(mine),
        "kept": mine,
    }


def contrastive(name: str) -> Objective:
    """An objective whose heads are linear: with batch norm two ranks are another network."""
    torch.manual_seed(0)
    spec = Spec(dim=5, patch=4, grid=(1, 2), depth=1)
    if name == "simclr":
        objective = SimCLR(spec)
        objective.head = nn.Sequential(nn.Linear(5, 7))
        return objective
    objective = MoCoV3(spec)
    objective.projector, objective.predictor = nn.Sequential(nn.Linear(5, 7)), nn.Linear(7, 7)
    objective.teacher = EmaCopy(objective.projector)
    return objective


def losses() -> RESULT:
    """Loss, gradient of the features and of the head, for this rank's part of the images."""
    found: RESULT = {}
    part = slice(rank() * IMAGES // world(), (rank() + 1) * IMAGES // world())
    images = IMAGES // world()
    scores = 40 * randn(IMAGES, 5, seed=9)[part]  # float32 overflows without the maximum
    found["sinkhorn"] = sinkhorn(scores, 0.04, total=total, largest=largest)
    for name in ("simclr", "moco"):
        objective, feats = contrastive(name), {}
        for i, reads in enumerate(objective.passes):
            cls = randn(2, IMAGES, 1, 5, seed=i)[:, part].flatten(0, 1).requires_grad_()
            feats[reads] = Tokens(cls, torch.zeros(2 * images, 2, 5))
        view = {"global": torch.zeros(2, images, 3, 4, 8)}
        batch = Batch(views=view, label=torch.zeros(images).long(), position=rank() * images)
        loss = objective(feats, batch, Step(0, 0.0)).value
        loss.backward()
        head = {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}
        features = feats[objective.passes[0]].prefix.grad
        assert features is not None
        found[name] = {
            "loss": loss.detach(),
            "features": features.unflatten(0, (2, images)),
            "head": head,
        }
    return found


class Masks(pl.Callback):
    """The hidden patches of every forward."""

    def __init__(self):
        self.hidden: list[Tensor] = []

    def on_fit_start(self, trainer, pl_module) -> None:
        def hook(module, args) -> None:
            if args[1] is not None:
                self.hidden.append(args[1].hidden)

        pl_module.backbone.register_forward_pre_hook(hook)


def trainings() -> RESULT:
    """Three updates of two accumulated micro-batches of every recipe, by Lightning."""
    found = {}
    for recipe in RECIPES:
        module, masks = known(pretraining(recipe)), Masks()
        stream = ToyStream(IMAGES // world(), dtype=torch.float64)
        options: dict[str, Any] = {"callbacks": [masks], "accumulate_grad_batches": 2}
        if world() > 1:
            options |= {"strategy": "ddp", "devices": 2}
        fit(module, steps=3, stream=stream, **options)
        state = {k: v.clone() for k, v in module.state_dict().items()}
        found[f"train/{recipe}"] = {"state": state, "hidden": masks.hidden}
    return found


def analyses() -> RESULT:
    """Every analysis, of this rank's batches, and CKA with another network."""
    batches = [
        {
            "views": {"clean": randn(1, 5 + i, 3, *SIZE, seed=i)},
            "label": torch.arange(5 + i) % 3,
            "position": 0,
            "keys": [f"{i} {j}" for j in range(5 + i)],
        }
        for i in range(4)
    ]
    settings = Settings(replicates=7, cka=("flat/raw", "mean/standardised"), minibatch=5)
    stacks, found = [], None
    for seed in range(2):
        chosen = suite(set(NAMES) - {"pictures"}, settings)
        # Batches in turn, as loaders give them out.
        mine = batches[rank() :: world()]
        analysed = analyse(tiny_vit(seed=seed), mine, chosen)
        found = found or analysed.flat() | {"images": analysed.images}
        stacks.append([a.stack() for a in chosen.values() if isinstance(a, Grams)])
    for one, other in zip(*stacks, strict=True):
        found |= {k: v for r in compare(one, other) for k, v in r.flat().items()}
    by_myself = {}
    if rank() == 0:  # the other does not come: whoever waited for it would wait for ever
        with everyone_for_himself():
            analysed = analyse(tiny_vit(), batches, suite(["attention", "classes"], settings))
        by_myself = analysed.flat()
    return {"analysed": found, "by_myself": by_myself}
