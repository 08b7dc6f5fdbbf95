"""DINO against tensors of the authors' own code: six steps of multi-crop, AdamW and averaging."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from contramask.checkpoints.architecture import Wishes
from contramask.checkpoints.importing import import_backbone
from contramask.models.ema import EmaCopy
from contramask.models.vit import VisionTransformer
from contramask.objectives.dino import DINO
from contramask.optim import Clip, Optim, Rule
from contramask.schedule import Schedule
from contramask.types import Batch, Pass, Step

EPOCHS = 4  # of two iterations; six of the eight were stored
STEPS = 8


@pytest.fixture(scope="module")
def official(parity):
    return parity("dino")


class Trained(nn.Module):
    """Backbone, its average and the objective, with the official names behind them."""

    def __init__(self, c: dict):
        super().__init__()
        self.backbone = VisionTransformer(
            "vit_small_patch16_224",
            img_size=c["img"],
            patch_size=c["patch"],
            interpolation="dino",
            timm={"embed_dim": c["dim"], "depth": c["depth"], "num_heads": c["heads"]},
        )
        self.teacher = EmaCopy(self.backbone)
        self.objectives = nn.ModuleDict(
            {
                "distil": DINO(
                    self.backbone.spec,
                    out=c["out_dim"],
                    hidden=c["hidden"],
                    bottleneck=c["bottleneck"],
                    norm_last_layer=True,
                )
            }
        )

    def load(self, path: Path, run: dict) -> None:
        """Both backbones by the converter, heads by their names here."""
        for net, own in (("student", self.backbone), ("teacher", self.teacher.module)):
            found = import_backbone(path, net=net, wishes=Wishes(heads=4)).backbone
            assert found.spec == own.spec
            assert found.config["interpolation"] == own.config["interpolation"]
            own.load_state_dict(found.state_dict(), strict=True)
        state = {"centre": run["steps"][0]["center_before"][0]}
        for net in ("student", "teacher"):
            names = {k: ours(k, teacher=net == "teacher") for k in run[net] if "head" in k}
            state |= {n.removeprefix("objectives.distil."): run[net][k] for k, n in names.items()}
        self.objectives["distil"].load_state_dict(state, strict=True)

    def feats(self, crops: list[torch.Tensor]) -> tuple[dict, Batch]:
        views = {"global": torch.stack(crops[:2]), "local": torch.stack(crops[2:])}
        objective = self.objectives["distil"]
        assert isinstance(objective, DINO)
        student, teacher, local = objective.passes
        feats = {
            student: self.backbone(views["global"].flatten(0, 1)),
            teacher: self.teacher(views["global"].flatten(0, 1)),
            local: self.backbone(views["local"].flatten(0, 1)),
        }
        assert local == Pass("local")
        images = len(crops[0])
        return feats, Batch(views=views, label=torch.full((images,), -1), position=0)


def ours(name: str, *, teacher: bool = False) -> str:
    part, rest = name.split(".", 1)
    rest = rest.replace("weight_g", "parametrizations.weight.original0")
    rest = rest.replace("weight_v", "parametrizations.weight.original1")
    if part == "head":
        return f"objectives.distil.{'teacher.module' if teacher else 'head'}.{rest}"
    return f"{'teacher.module' if teacher else 'backbone'}.vit.{rest}"


@pytest.fixture(scope="module")
def released(official, tmp_path_factory):
    """A checkpoint of distributed training, as their code writes it."""
    path = tmp_path_factory.mktemp("dino") / "checkpoint0001.pth"
    run = official["norm_last_true"]
    student = {f"module.{k}": v for k, v in run["student"].items()}
    torch.save({"student": student, "teacher": run["teacher"], "epoch": 1}, path)
    return path


@pytest.fixture
def model(official, released):
    model = Trained(official["config"])
    model.load(released, official["norm_last_true"])
    return model.train()


def test_the_first_step(model, official, close):
    run = official["norm_last_true"]
    first, objective = run["steps"][0], model.objectives["distil"]
    feats, batch = model.feats(first["crops"])
    loss = objective(feats, batch, Step(0, 0.0))
    cls = [feats[p].cls for p in objective.passes]
    scores = objective.head(torch.cat([cls[0], cls[2]]))
    close("scores", scores, first["student_out"], "student", absolute=5e-6)
    close("scores", objective.teacher(cls[1]), first["teacher_out"], "teacher", absolute=5e-6)
    close("loss", loss.value, first["loss"], relative=1e-5)
    close("centre", loss.state["centre"], first["center_after"][0], absolute=5e-6)
    loss.value.backward()
    parameters = dict(model.named_parameters())
    for name, gradient in first["grads_before_clip"].items():
        found = parameters[ours(name)].grad
        if gradient is None:
            assert found is None, name
        else:
            close("gradients", found, gradient, name, of_max=5e-5)


def test_six_steps(model, official, close):
    """Losses, centres, norms before clipping, frozen prototypes, AdamW, averages."""
    run, objective = official["norm_last_true"], model.objectives["distil"]
    rates = Schedule(peak=max(run["lr_sched"]).item())  # written over by the stored ones
    optim = Optim(
        lr=rates,
        batch=None,
        betas=(0.9, 0.999),
        rules=[
            Rule(r"last_layer.*original1", freeze=1 / EPOCHS),
            Rule(r"\.bias$", decay=0.0),
            Rule(ndim=1, decay=0.0),
        ],
        clip=None,
    )
    optimizer = optim.build(model.named_parameters(), fused=False)
    for i, step in enumerate(run["steps"]):
        progress = i / STEPS
        objective.teacher_temperature = run["temp_sched"][step["epoch"]].item()
        feats, batch = model.feats(step["crops"])
        loss = objective(feats, batch, Step(i, progress))
        close("loss of six steps", loss.value, step["loss"], relative=1e-5)
        close("centre", objective.centre, step["center_before"][0], absolute=5e-6)
        objective.centre.copy_(loss.state["centre"])
        optimizer.zero_grad()
        loss.value.backward()
        norms = [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
        expected = torch.tensor(sorted(step["grad_norms"]))
        close("gradient norms of six steps", torch.tensor(sorted(norms)), expected, of_max=1e-5)
        clip = Clip(step["clip"], per="tensor")
        replace(optim, clip=clip).shorten(model.named_parameters(), progress)
        optim.set(optimizer, progress, 1)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = step["lr"], step["wd"] * group["decay_factor"]
        optimizer.step()
        for module in model.modules():
            if isinstance(module, EmaCopy):
                module.update(step["m"])
    limit = max(step["lr"] for step in run["steps"])  # Adam amplifies the noise of gradients
    for name, expected in run["student_final"].items():
        found = model.get_parameter(ours(name))
        close("weights after six steps", found, expected, name, absolute=limit)
    for name, expected in run["teacher_final"].items():
        found = model.get_parameter(ours(name, teacher=True))
        close("averages after six steps", found, expected, name, absolute=0.1 * limit)


def test_groups(model, official):
    rules = [Rule(r"\.bias$", decay=0.0), Rule(ndim=1, decay=0.0)]
    groups = Optim(rules=rules).groups(model.named_parameters())
    decayed, free = official["norm_last_true"]["param_groups"]
    found = {g["decay_factor"]: set(g["names"]) for g in groups}
    assert found == {1.0: {ours(n) for n in decayed}, 0.0: {ours(n) for n in free}}


def test_schedules(official):
    run = official["norm_last_true"]
    lr = run["lr_sched"].double()
    warm = int(lr.argmax()) + 1  # both ends of the warm-up are in it
    peak = lr.max().item()
    # What the cosine would reach one step after the last.
    last = (1 - math.cos(math.pi * (STEPS - warm - 1) / (STEPS - warm))) / 2
    end = peak - (peak - lr[-1].item()) / last
    schedule = Schedule(peak=peak, end=end, warmup=(warm - 1) / STEPS, hold=1 / STEPS)
    for i, expected in enumerate(lr.tolist()):
        assert schedule(i / STEPS) == pytest.approx(expected, rel=1e-6, abs=1e-12)
    for key, low, high in (("wd_sched", 0.04, 0.4), ("m_sched", 0.996, 1.0)):
        schedule = Schedule(peak=low, end=high)
        for i, expected in enumerate(run[key].tolist()):
            assert schedule(i / STEPS) == pytest.approx(expected, rel=1e-6)
    temperatures = run["temp_sched"].tolist()
    warm = temperatures.index(max(temperatures)) + 1
    schedule = Schedule(
        peak=temperatures[-1],
        start=temperatures[0],
        warmup=(warm - 1) / EPOCHS,
        shape="constant",
        stairs=EPOCHS,
    )
    for step in run["steps"]:
        progress = step["it"] / STEPS
        assert schedule(progress) == pytest.approx(temperatures[step["epoch"]], rel=1e-6)
