"""Fine-tuning against tensors of MAE's own code: features, scores, groups, layer-wise decay."""

import pytest
import torch

from contramask.checkpoints.architecture import Wishes
from contramask.checkpoints.importing import import_backbone
from contramask.models.classifier import Classifier, tunable
from contramask.optim import Optim
from contramask.training.finetuning import UNDECAYED

OPTIM = Optim(lr=1.0, batch=None, decay=0.05, layer_decay=0.65, rules=UNDECAYED)


@pytest.fixture(scope="module")
def official(parity):
    return parity("mae")


def ours(name: str) -> str:
    """The name a parameter of their fine-tuned model has here: `fc_norm` is the last norm."""
    if name.startswith("head."):
        return name
    return "backbone.vit." + name.replace("fc_norm", "norm")


@pytest.fixture(params=["avg", "cls"])
def kind(request):
    return request.param


@pytest.fixture
def tuned(official, tmp_path, kind):
    """Their model, through the files that users have: a checkpoint and `tunable`."""
    saved = official["finetune"][kind]["state_dict"]
    state = {k: v for k, v in official["state_dict"].items() if not k.startswith("decoder")}
    state = {k: v for k, v in state.items() if k != "mask_token" and not k.startswith("norm.")}
    if kind == "cls":
        names = ("norm.weight", "norm.bias")
        state |= {name: official["state_dict"][name] for name in names}
    torch.save({"model": state | saved}, tmp_path / "tuned.pth")
    wishes = Wishes(heads=official["config"]["heads"])
    backbone = import_backbone(tmp_path / "tuned.pth", wishes=wishes).backbone
    size = official["config"]["img_size"]
    pool = "mean" if kind == "avg" else "cls"
    classifier = Classifier(tunable(backbone, size=size, drop_path=0.1), 7, pool=pool)
    classifier.head.load_state_dict({k: saved[f"head.{k}"] for k in ("weight", "bias")})
    return classifier


def test_features_and_scores(official, tuned, close, kind):
    tuned.eval()
    expected = official["finetune"][kind]
    close("features", tuned.features(official["imgs"]), expected["features"], absolute=5e-6)
    close("logits", tuned(official["imgs"]), expected["logits"], absolute=5e-6)


def test_groups(official, tuned, kind):
    """Every parameter, its factor of the rate and its decay."""
    found = {
        name: (group["lr_factor"], 0.05 * group["decay_factor"])
        for group in OPTIM.groups(tuned.named_parameters())
        for name in group["names"]
    }
    expected = {
        ours(name): (group["lr_scale"], group["wd"])
        for group in official["finetune"][kind]["groups"]
        for name in group["names"]
    }
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        assert found[name] == pytest.approx(pair, rel=1e-12), name


def test_layer_wise_decay_of_vit_b(official):
    """Their factors for twelve blocks, from layer numbers of names."""
    case = official["layer_decay"]
    assert case["num_layers"] == 13
    names = {ours(name): number for name, number in case["layer_ids"].items()}
    parameters = [(name, torch.nn.Parameter(torch.zeros(2, 2))) for name in names]
    optim = Optim(layer_decay=case["decay"])
    found = {n: g["lr_factor"] for g in optim.groups(parameters) for n in g["names"]}
    for name, number in names.items():
        assert found[name] == pytest.approx(case["scales"][number], rel=1e-12), name
