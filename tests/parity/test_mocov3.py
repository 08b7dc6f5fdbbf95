"""MoCo v3 against tensors of the authors' own code: queries, keys, loss, gradients, averages."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from contramask.checkpoints.architecture import Wishes
from contramask.checkpoints.importing import import_backbone
from contramask.functional.contrast import infonce
from contramask.functional.patches import sincos
from contramask.models.ema import EmaCopy
from contramask.models.vit import VisionTransformer
from contramask.objectives.moco import MoCoV3
from contramask.schedule import Schedule
from contramask.types import Pass, Step


@pytest.fixture(scope="module")
def official(parity):
    return parity("mocov3")


class Trained(torch.nn.Module):
    """Backbone, its average and the objective, with the official names behind them."""

    def __init__(self, c: dict):
        super().__init__()
        self.backbone = VisionTransformer(
            "vit_small_patch16_224",
            img_size=c["img_size"],
            patch_size=c["patch_size"],
            positions="sincos_rows_first",
            init="mocov3",
            freeze_patch_embed=True,
            timm={"embed_dim": c["embed_dim"], "depth": c["depth"], "num_heads": c["num_heads"]},
        )
        self.teacher = EmaCopy(self.backbone)
        self.objective = MoCoV3(self.backbone.spec, out=c["dim"], hidden=c["mlp_dim"])

    def load(self, path: Path, state: dict) -> None:
        """Both backbones by the converter, heads by their names here."""
        heads = {ours(k): v for k, v in state.items() if ours(k).startswith("objective.")}
        heads = {k.removeprefix("objective."): v for k, v in heads.items()}
        self.objective.load_state_dict(heads, strict=True)
        for net, own in (("student", self.backbone), ("teacher", self.teacher.module)):
            found = import_backbone(path, net=net, wishes=Wishes(heads=4)).backbone
            assert found.spec == own.spec
            assert found.config["positions"] == own.config["positions"]
            own.load_state_dict(found.state_dict(), strict=True)


def ours(name: str) -> str:
    net, rest = name.split(".", 1)
    if net == "predictor":
        return f"objective.predictor.{rest}"
    if rest.startswith("head."):
        rest = rest.removeprefix("head.")
        where = "projector" if net == "base_encoder" else "teacher.module"
        return f"objective.{where}.{rest}"
    return ("backbone.vit." if net == "base_encoder" else "teacher.module.vit.") + rest


@pytest.fixture(scope="module")
def released(official, tmp_path_factory):
    """A checkpoint of distributed training, as their code writes it."""
    path = tmp_path_factory.mktemp("mocov3") / "checkpoint_0299.pth.tar"
    state = {f"module.{k}": v for k, v in official["state_before"].items()}
    torch.save({"epoch": 300, "arch": "vit_small", "state_dict": state}, path)
    return path


@pytest.fixture
def model(official, released):
    model = Trained(official["config"])
    model.load(released, official["state_before"])
    return model


def run(model, official):
    x = torch.stack([official["x1"], official["x2"]])
    for module in model.modules():  # the teachers move before the keys are computed
        if isinstance(module, EmaCopy):
            module.update(official["config"]["m"])
    model.train()
    student, teacher = Pass("global"), Pass("global", net="teacher")
    feats = {student: model.backbone(x.flatten(0, 1)), teacher: model.teacher(x.flatten(0, 1))}
    batch = {"views": {"global": x}, "label": torch.zeros(6), "position": 0}
    return feats, model.objective(feats, batch, Step(0, 0.0))


def test_positions(official, close):
    table = torch.cat([torch.zeros(1, 768), sincos(768, (14, 14), rows_first=True)])
    close("positions", table, official["sincos_224_768"], absolute=1e-5)


def test_features(model, official, close):
    found = model.eval().backbone(official["x1"]).cls
    close("features", found, official["features_cls_eval"], absolute=5e-6)


def test_what_is_trained(model, official):
    parameters = dict(model.named_parameters())
    for name, trained in official["requires_grad"].items():
        if not name.startswith("momentum"):
            assert parameters[ours(name)].requires_grad == trained, name
    assert not any(p.requires_grad for p in model.teacher.parameters())


def test_queries_and_keys(model, official, close):
    feats, _ = run(model, official)
    # Batch norm saw each view once already in `run`; in train mode its output depends on the batch
    # alone, so asking again gives the same.
    q = [
        model.objective.predictor(model.objective.projector(x))
        for x in feats[Pass("global")].cls.chunk(2)
    ]
    k = [model.objective.teacher(x) for x in feats[Pass("global", net="teacher")].cls.chunk(2)]
    for found, name in zip(q + k, ("q1", "q2", "k1", "k2"), strict=True):
        close("queries and keys", found, official[name], name, of_max=2e-5)


def test_loss_gradients_and_state_after(model, official, close):
    _, loss = run(model, official)
    close("loss", loss.value, official["loss"], relative=1e-5)
    loss.value.backward()
    parameters = dict(model.named_parameters())
    for name, gradient in official["grads"].items():
        found = parameters[ours(name)].grad
        if gradient is None:
            assert found is None, name
            continue
        if name == "base_encoder.norm.bias":  # batch norm follows: what is left is noise
            close("gradients of nothing", found, gradient, name, absolute=1e-6)
        else:
            close("gradients", found, gradient, name, of_max=5e-5)
    after = model.state_dict()
    for name, expected in official["state_after"].items():
        close("state after the step", after[ours(name)], expected, name, absolute=2e-6)


def test_each_direction(official, close):
    norm = {k: F.normalize(official[k], dim=-1) for k in ("q1", "q2", "k1", "k2")}
    for q, k, name in (("q1", "k2", "loss_q1k2"), ("q2", "k1", "loss_q2k1")):
        loss = 2 * 0.2 * infonce(norm[q], norm[k], 0.2)
        close("loss of a direction", loss, official[name], relative=1e-5)


def test_two_ranks_given_their_keys(official, close):
    case = official["two_rank"]
    keys = F.normalize(case["k"], dim=-1).flatten(0, 1)
    for rank in range(2):
        q = case["q"][rank].clone().requires_grad_()
        loss = 0.4 * infonce(F.normalize(q, dim=-1), keys, 0.2, offset=5 * rank)
        loss.backward()
        close("loss of two ranks", loss, case["loss"][rank], relative=1e-5)
        close("gradients of two ranks", q.grad, case["grad_q"][rank], of_max=5e-5)


def test_schedules(official):
    a = official["lr_sched"]["args"]
    lr = Schedule(peak=a["lr"], end=0.0, warmup=a["warmup"] / a["epochs"])
    for epoch, value in official["lr_sched"]["values"]:
        assert lr(epoch / a["epochs"]) == pytest.approx(value, rel=1e-9, abs=1e-15)
    momentum = Schedule(peak=0.99, end=1.0)
    for epoch, value in official["m_sched"]["values"]:
        assert momentum(epoch / 300) == pytest.approx(value, rel=1e-12)


def test_initialisation_has_the_official_moments(official):
    torch.manual_seed(0)
    model = Trained(official["config"])
    state = model.state_dict()
    for name, stats in official["init_state_dict"].items():
        value = state[ours(name)].float()
        if name.endswith("num_batches_tracked"):
            continue
        assert value.abs().max().item() == pytest.approx(stats["absmax"], rel=0.6, abs=1e-12), name
        if value.numel() > 500:
            assert value.std().item() == pytest.approx(stats["std"], rel=0.05), name
