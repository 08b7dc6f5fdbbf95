"""MAE against tensors of the authors' own code: features, loss, gradients, schedule, groups."""

import pytest
import torch

from contramask.checkpoints.architecture import Wishes
from contramask.checkpoints.importing import import_backbone
from contramask.functional.patches import patchify, sincos
from contramask.masks import RandomMasking
from contramask.models.vit import VisionTransformer
from contramask.objectives.mae import MAE
from contramask.optim import LARS, Optim, Rule
from contramask.schedule import Schedule
from contramask.types import Pass, Step

STEP = Step(0, 0.0)
READS = Pass("mild", "random")


def ours(name: str) -> str:
    """The name a parameter of the official code has here."""
    if name.startswith("decoder_") or name == "mask_token":
        name = name.replace("decoder_pred", "out").replace("decoder_pos_embed", "positions")
        return "objective.decoder." + name.removeprefix("decoder_")
    return "backbone.vit." + name


@pytest.fixture(scope="module")
def official(parity):
    return parity("mae")


@pytest.fixture(scope="module")
def released(official, tmp_path_factory):
    """A training checkpoint, as their code writes it."""
    path = tmp_path_factory.mktemp("mae") / "checkpoint-799.pth"
    torch.save({"model": official["state_dict"], "epoch": 799}, path)
    return path


@pytest.fixture
def model(official, released):
    """The backbone by the converter, the decoder by its names here."""
    c = official["config"]
    backbone = import_backbone(released, wishes=Wishes(heads=c["heads"])).backbone
    sizes = {"dim": c["dec_dim"], "depth": c["dec_depth"], "heads": c["dec_heads"]}
    objective = MAE(backbone.spec, mask="random", **sizes)
    state = {}
    for key, value in official["state_dict"].items():
        if key == "decoder_pos_embed":
            torch.testing.assert_close(objective.decoder.positions, value[0, 1:], atol=1e-6, rtol=0)
        elif ours(key).startswith("objective."):
            name = ours(key).removeprefix("objective.")
            state[name] = value.flatten() if key == "mask_token" else value
    objective.load_state_dict(state, strict=True)
    return torch.nn.ModuleDict({"backbone": backbone, "objective": objective}).train()


def run(model, official):
    mask = RandomMasking(model["backbone"].spec, ratio=0.75).hide(official["noise"])
    tokens = model["backbone"](official["imgs"], mask)
    batch = {"views": {"mild": official["imgs"][None]}, "label": torch.zeros(4), "position": 0}
    return tokens, model["objective"]({READS: tokens}, batch, STEP)


def test_positions(official, close):
    table = torch.cat([torch.zeros(1, 768), sincos(768, (14, 14))])
    close("positions", table, official["sincos_224_768"], absolute=1e-6)
    backbone = VisionTransformer(
        img_size=64,
        patch_size=8,
        positions="sincos",
        timm={"embed_dim": 96, "depth": 1, "num_heads": 3},
    )
    assert not backbone.vit.pos_embed.requires_grad
    close("positions", backbone.vit.pos_embed[0], official["sincos_tiny"], absolute=1e-6)


def test_features(model, official, close):
    tokens = model["backbone"](official["imgs"])
    found = torch.cat([tokens.prefix, tokens.patch], 1)
    close("features", found, official["features_unmasked"], absolute=5e-6)


def test_masked_features(model, official, close):
    tokens, _ = run(model, official)
    kept = official["noise"].argsort(1)[:, :16]  # the authors keep the shuffled order
    order = kept.argsort(1)[..., None].expand(-1, -1, 96)
    latent = official["norm_pix"]["latent"]
    close("masked features", tokens.cls, latent[:, 0], absolute=5e-6)
    close("masked features", tokens.patch, latent[:, 1:].gather(1, order), absolute=5e-6)
    assert torch.equal(tokens.mask.hidden, official["norm_pix"]["mask"].bool())


def test_loss_and_every_gradient(model, official, close):
    tokens, loss = run(model, official)
    # Their stored target is the patches before they are normalised.
    close("target", patchify(official["imgs"], 8), official["norm_pix"]["target"], absolute=1e-12)
    prediction = model["objective"].decoder(tokens)
    close("prediction", prediction, official["norm_pix"]["pred"], absolute=5e-6)
    close("loss", loss.value, official["norm_pix"]["loss"], relative=1e-5)
    loss.value.backward()
    parameters, seen = dict(model.named_parameters()), set()
    for key, gradient in official["norm_pix"]["grads"].items():
        if gradient is None:
            assert key in ("pos_embed", "decoder_pos_embed")
            continue
        close("gradients", parameters[ours(key)].grad, gradient, key, of_max=5e-5)
        seen.add(ours(key))
    assert seen == {n for n, p in parameters.items() if p.requires_grad}


def test_loss_of_raw_pixels(model, official, close):
    model["objective"].normalise = False
    _, loss = run(model, official)
    close("loss of raw pixels", loss.value, official["raw_pix"]["loss"], relative=1e-5)


def test_masking_keeps_the_smallest_noise(official):
    spec = VisionTransformer(img_size=64, patch_size=8, timm={"depth": 1}).spec

    mask = RandomMasking(spec, ratio=0.75).hide(official["noise"])
    assert torch.equal(mask.hidden, official["norm_pix"]["mask"].bool())
    assert mask.visible == 16


def test_learning_rate(official):
    a = official["lr_sched"]["args"]
    schedule = Schedule(peak=a["lr"], end=a["min_lr"], warmup=a["warmup"] / a["epochs"])
    for epoch, lr in official["lr_sched"]["values"]:
        assert schedule(epoch / a["epochs"]) == pytest.approx(lr, rel=1e-9, abs=1e-15)


def test_decay_groups(model, official):
    # As in the recipe: the authors' mask token is (1, 1, D), hence decayed; here it is a vector.
    rules = [Rule("mask_token"), Rule(ndim=1, decay=0.0)]
    groups = Optim(rules=rules, decay=0.05).groups(model.named_parameters())
    found = {g["decay_factor"] * 0.05: set(g["names"]) for g in groups}
    for group in official["wd_groups"]:
        assert found[group["wd"]] == {ours(n) for n in group["names"]}


def test_lars(official, close):
    case = official["lars"]
    w, b = (torch.nn.Parameter(case[k].clone()) for k in ("w0", "b0"))
    optimizer = LARS([w, b], lr=case["lr"], momentum=case["momentum"], eta=case["eta"])
    optimizer.param_groups[0]["weight_decay"] = case["wd"]
    for grads, (w_next, b_next) in zip(case["grads"], case["traj"], strict=True):
        w.grad, b.grad = grads
        optimizer.step()
        close("LARS", w, w_next, absolute=1e-6)
        close("LARS", b, b_next, absolute=1e-6)


@pytest.mark.parametrize("kind", ["avg", "cls"])
def test_features_of_fine_tuned_models(official, tmp_path, close, kind):
    """With `fc_norm` on the mean of the patches, or the class token."""
    encoder = {k: v for k, v in official["state_dict"].items() if "blocks" in k or "embed" in k}
    encoder = {k: v for k, v in encoder.items() if not k.startswith("decoder")}
    names = ("cls_token",) if kind == "avg" else ("cls_token", "norm.weight", "norm.bias")
    encoder |= {k: official["state_dict"][k] for k in names}
    tuned = official["finetune"][kind]
    torch.save({"model": encoder | tuned["state_dict"]}, tmp_path / "tuned.pth")
    wishes = Wishes(heads=official["config"]["heads"])
    backbone = import_backbone(tmp_path / "tuned.pth", wishes=wishes).backbone.eval()
    tokens = backbone(official["imgs"], layers=(1,))
    mean = backbone.vit.norm(tokens.layers[1][:, 1:].mean(1))
    found = mean if kind == "avg" else tokens.cls
    close("features, fine-tuned", found, tuned["features"], absolute=5e-6)
