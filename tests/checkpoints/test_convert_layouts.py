"""Every known layout becomes a backbone with the features of an independent reference."""

from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn

from contramask.checkpoints.architecture import Wishes
from contramask.checkpoints.export import load_backbone
from contramask.checkpoints.importing import import_backbone, write_imported
from contramask.functional.patches import sincos
from contramask.models.positions import resize_positions, resize_relative
from contramask.types import UserError
from tests.builders import randn
from tests.checkpoints.convert_files import (
    HEADS,
    IMAGE,
    SIZES,
    assert_same,
    imported,
    joined,
    prefixed,
    vit,
)


def head(*names: str) -> dict[str, torch.Tensor]:
    return {name: randn(4, 4, seed=i) for i, name in enumerate(names)}


# ---- tensors of the authors' own code ------------------------------------------------------------


def test_mae_as_it_was_pretrained(parity, tmp_path):
    case = parity("mae")
    content = {"model": case["state_dict"], "optimizer": {"state": {0: torch.ones(2)}}, "epoch": 7}
    found = imported(tmp_path, content)
    assert (found.layout, found.net) == ("mae", "student")
    assert found.backbone.config["positions"] == "sincos"
    assert sum(found.dropped.values()) == 32  # the mask token and the decoder, all of it
    tokens = found.backbone.eval()(case["imgs"])
    both = torch.cat([tokens.prefix, tokens.patch], 1)
    torch.testing.assert_close(both, case["features_unmasked"], atol=5e-6, rtol=0)


def test_mae_as_it_was_released(parity, tmp_path):
    """The encoder alone is known by its positions."""
    case = parity("mae")
    own = {k: v for k, v in case["state_dict"].items() if "decoder" not in k and "mask" not in k}
    found = imported(tmp_path, {"model": own})
    assert found.layout == "mae"
    assert not found.dropped
    tokens = found.backbone.eval()(case["imgs"])
    both = torch.cat([tokens.prefix, tokens.patch], 1)
    torch.testing.assert_close(both, case["features_unmasked"], atol=5e-6, rtol=0)


@pytest.mark.parametrize("kind", ["avg", "cls"])
def test_mae_fine_tuned(parity, tmp_path, kind):
    case = parity("mae")
    tuned = case["finetune"][kind]
    parts = ("norm.",) if kind == "avg" else ()
    trunk = {
        k: v
        for k, v in case["state_dict"].items()
        if not k.startswith(("decoder", "mask_token", *parts))
    }
    found = imported(tmp_path, {"model": trunk | tuned["state_dict"]})
    assert found.dropped == {"head": 2}
    tokens = found.backbone.eval()(case["imgs"], layers=(1,))
    if kind == "avg":
        assert "fc_norm" in found.notes[0]
        feature = found.backbone.vit.norm(tokens.layers[1][:, 1:].mean(1))
    else:
        feature = tokens.cls
    torch.testing.assert_close(feature, tuned["features"], atol=5e-6, rtol=0)


@pytest.mark.parametrize("net", ["student", "teacher"])
def test_mocov3(parity, tmp_path, net):
    case = parity("mocov3")
    content = {"state_dict": prefixed("module.", case["state_before"]), "arch": "vit", "epoch": 1}
    found = imported(tmp_path, content, Wishes(heads=4), net=net)
    assert (found.layout, found.net) == ("mocov3", net)
    assert found.backbone.config["positions"] == "sincos_rows_first"
    start = "base_encoder." if net == "student" else "momentum_encoder."
    for name, value in found.backbone.vit.state_dict().items():
        assert torch.equal(value, case["state_before"][start + name])
    if net == "student":
        cls = found.backbone.eval()(case["x1"]).cls
        torch.testing.assert_close(cls, case["features_cls_eval"], atol=5e-6, rtol=0)


def test_mocov3_small_has_twelve_heads(tmp_path):
    model = vit(embed_dim=384, depth=1, num_heads=12)
    content = {"state_dict": prefixed("module.base_encoder.", model.state_dict())}
    found = imported(tmp_path, content, Wishes())
    assert_same(found.backbone, model.forward_features(IMAGE))
    plain = imported(tmp_path, model.state_dict(), Wishes())
    assert plain.backbone.config["timm"]["num_heads"] == 6
    assert not torch.allclose(joined(plain.backbone), joined(found.backbone), atol=1e-3)


@pytest.mark.parametrize("net", [None, "student"])
def test_dino(parity, tmp_path, net):
    case = parity("dino")["norm_last_true"]
    content = {
        "student": prefixed("module.", case["student"]),
        "teacher": case["teacher"],
        "dino_loss": {"center": torch.zeros(1, 128)},
        "optimizer": {"state": {}},
        "epoch": 3,
    }
    found = imported(tmp_path, content, Wishes(heads=4), net=net)
    assert (found.layout, found.net) == ("dino", net or "teacher")
    assert found.backbone.config["interpolation"] == "dino"
    expected = case[net or "teacher"]
    for name, value in found.backbone.vit.state_dict().items():
        assert torch.equal(value, expected[f"backbone.{name}"])


def test_dino_backbone_alone_on_other_sizes(parity, tmp_path):
    case = parity("dino")["features"]
    found = imported(tmp_path, case["state_dict"], Wishes(heads=4), layout="dino")
    assert found.net == "teacher"
    for size in ("32", "48", "rect"):
        cls = found.backbone.eval()(case[f"x{size}"]).cls
        torch.testing.assert_close(cls, case[f"cls{size}"], atol=5e-6, rtol=0)
    # Resized when it is imported, and not again at 48 pixels.
    wishes = Wishes(heads=4, img_size=48)
    larger = imported(tmp_path, case["state_dict"], wishes, layout="dino").backbone
    assert larger.spec.grid == (6, 6)
    torch.testing.assert_close(larger.vit.pos_embed, case["pos48"], atol=1e-7, rtol=0)
    torch.testing.assert_close(larger.eval()(case["x48"]).cls, case["cls48"], atol=5e-6, rtol=0)


# ---- against timm --------------------------------------------------------------------------------


def test_ibot(tmp_path):
    student, teacher = vit(seed=1), vit(seed=2)
    heads = head("head.mlp.0.weight", "head.last_layer2.weight_v")
    own = prefixed("backbone.", student.state_dict()) | {"backbone.masked_embed": randn(1, 24)}
    content = {
        "student": prefixed("module.", own | heads),
        "teacher": prefixed("backbone.", teacher.state_dict()) | heads,
        "ibot_loss": {"center": randn(1, 4), "center2": randn(1, 1, 4)},
        "fp16_scaler": {},
    }
    found = imported(tmp_path, content)
    assert (found.layout, found.net) == ("ibot", "teacher")
    assert_same(found.backbone, teacher.forward_features(IMAGE))
    assert_same(
        imported(tmp_path, content, net="student").backbone, student.forward_features(IMAGE)
    )
    alone = {"state_dict": student.state_dict() | {"masked_embed": randn(1, 24)}}
    assert_same(imported(tmp_path, alone).backbone, student.forward_features(IMAGE))


def dinov2(registers: int, gated: bool):
    """A state dict as DINOv2 writes it, and timm's network made from it by timm's own filter."""
    name = "vit_giant_patch14_dinov2" if gated else "vit_tiny_patch16_224"
    sizes = {"init_values": 1e-5, "mlp_ratio": 8 / 3 * 2 if gated else 4.0}
    if registers:
        sizes |= {"reg_tokens": registers, "no_embed_class": True}
    model = vit(name, **sizes)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state |= {"mask_token": randn(1, 24), "pos_embed": randn(1, 17, 24)}
    if registers:
        state["register_tokens"] = state.pop("reg_token")
    if gated:
        state = {
            k.replace("mlp.fc1.", "mlp.w12.").replace("mlp.fc2.", "mlp.w3."): v
            for k, v in state.items()
        }
    model.load_state_dict(checkpoint_filter_fn(dict(state), model))
    return state, model


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2(tmp_path, registers, gated):
    state, model = dinov2(registers, gated)
    found = imported(tmp_path, state)
    assert (found.layout, found.net) == ("dinov2", "teacher")
    assert found.backbone.config["interpolation"] == ("antialias" if registers else "dino")
    assert_same(found.backbone, model.forward_features(IMAGE))


def test_dinov2_in_chunks(tmp_path):
    """Training keeps blocks in chunks, with gaps before: blocks.<chunk>.<i>, i over all."""
    state, model = dinov2(4, False)
    chunked = {}
    for key, value in state.items():
        words = key.split(".")
        chunk = [str(int(words[1]) // 2)] if words[0] == "blocks" else []
        chunked[".".join([words[0], *chunk, *words[1:]])] = value
    content = {
        "teacher": prefixed("backbone.", chunked)
        | prefixed("dino_head.", head("mlp.0.weight"))
        | prefixed("ibot_head.", head("mlp.0.weight"))
    }
    assert_same(imported(tmp_path, content).backbone, model.forward_features(IMAGE))


def beit(**kinds: Any):
    return vit("beit_base_patch16_224", use_abs_pos_emb=False, init_values=0.1, **kinds)


@pytest.mark.parametrize("code", ["simmim", "beit"])
def test_shared_relative_positions(tmp_path, code):
    model = beit(use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
    state = model.state_dict() | {"mask_token": randn(1, 1, 24)}
    state["rel_pos_bias.relative_position_index"] = torch.zeros(17, 17, dtype=torch.long)
    if code == "simmim":
        content = prefixed("encoder.", state) | head("decoder.0.weight", "decoder.0.bias")
    else:
        content = state | head("lm_head.weight", "lm_head.bias")
    found = imported(tmp_path, {"model": content}, Wishes())
    assert found.layout == code
    assert found.backbone.config["positions"] == "relative"
    assert found.backbone.config["timm"]["num_heads"] == 3  # as wide as the table
    torch.testing.assert_close(
        joined(found.backbone), model.forward_features(IMAGE), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("kind", ["use_shared_rel_pos_bias", "use_rel_pos_bias"])
@pytest.mark.parametrize("side", [16, 48])
def test_relative_positions_are_resized(tmp_path, kind, side):
    kinds = {"use_rel_pos_bias": False, kind: True}
    content = beit(**kinds).state_dict()
    found = imported(tmp_path, {"model": content}, Wishes(img_size=side))
    assert found.backbone.config["img_size"] == (side, side)
    new = (side // 8, side // 8)
    resized = {
        k: resize_relative(v, (4, 4), new) if k.endswith("bias_table") else v
        for k, v in content.items()
    }
    expected = beit(**kinds, img_size=side)
    expected.load_state_dict(resized)
    image = randn(2, 3, side, side)
    torch.testing.assert_close(
        joined(found.backbone, image), expected.forward_features(image), atol=1e-5, rtol=0
    )


def test_relative_positions_of_each_block(tmp_path):
    """As BEiT is fine-tuned, with fc_norm; the classifier norms the mean of the patches."""
    model = beit(use_rel_pos_bias=True)
    tuned = beit(use_rel_pos_bias=True, global_pool="avg")
    state = model.state_dict()
    state["fc_norm.weight"], state["fc_norm.bias"] = (
        state.pop("norm.weight"),
        state.pop("norm.bias"),
    )
    tuned.load_state_dict(state)
    for i in range(3):
        index = torch.zeros(17, 17, dtype=torch.long)
        state[f"blocks.{i}.attn.relative_position_index"] = index
    found = imported(tmp_path, {"model": state | head("head.weight", "head.bias")}, Wishes())
    assert found.backbone.config["positions"] == "relative_per_block"
    tokens = found.backbone.eval()(IMAGE, layers=(2,))
    feature = found.backbone.vit.norm(tokens.layers[2][:, 1:].mean(1))
    torch.testing.assert_close(feature, tuned(IMAGE), atol=1e-5, rtol=0)
    assert_same(found.backbone, model.forward_features(IMAGE))


@pytest.mark.parametrize("net", ["student", "teacher"])
def test_ijepa(tmp_path, net):
    kind = {"class_token": False, "global_pool": ""}
    models = {"encoder": vit(seed=1, **kind), "target_encoder": vit(seed=2, **kind)}
    content = {k: prefixed("module.", m.state_dict()) for k, m in models.items()}
    content |= {"predictor": prefixed("module.", head("predictor_proj.weight")), "opt": {"a": {}}}
    found = imported(tmp_path, content, net=net)
    assert (found.layout, found.net) == ("ijepa", net)
    model = models["encoder" if net == "student" else "target_encoder"]
    assert_same(found.backbone, model.forward_features(IMAGE))
    assert found.backbone(IMAGE).prefix.shape == (2, 0, 24)


KINDS = [
    {},
    {"reg_tokens": 3},
    {"reg_tokens": 4, "no_embed_class": True},
    {"init_values": 0.1, "mlp_ratio": 2.0},
    {"pre_norm": True},
    {"qkv_bias": False},
    {"qk_norm": True},
    {"num_classes": 5},
    {"class_token": False, "global_pool": ""},
    {"mlp_ratio": 2.9},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("form", ["pth", "safetensors", "ema"])
def test_files_of_timm(tmp_path, kind, form):
    model = vit(**kind)
    if form == "safetensors":
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        found = import_backbone(tmp_path / "model.safetensors", wishes=HEADS)
    elif form == "ema":
        content = {"state_dict": vit(seed=1, **kind).state_dict(), "epoch": 4, "metric": 71.5}
        ema = content | {"state_dict_ema": model.state_dict()}
        found = imported(tmp_path, ema, net="teacher")
    else:
        found = imported(tmp_path, model.state_dict())
    assert found.layout == "timm"
    assert_same(found.backbone, model.forward_features(IMAGE))


@pytest.mark.parametrize(
    ("student", "teacher", "more"),
    [
        ("backbone.", None, ["classifier.weight"]),
        ("backbone.", "momentum_backbone.", ["projector.0.weight", "momentum_projector.0.weight"]),
        ("student_backbone.vit.", "teacher_backbone.vit.", ["student_head.mlp.0.weight"]),
        ("model.backbone.", None, ["model.head.weight"]),
        ("backbone.vit.", None, ["backbone.mask_token", "decoder.embed.weight"]),
        ("_orig_mod.module.encoder.", None, ["criterion.center"]),
    ],
)
def test_lightning_modules(tmp_path, student, teacher, more):
    models = [vit(seed=1), vit(seed=2)]
    state = prefixed(student, models[0].state_dict()) | head(*more)
    if teacher:
        state |= prefixed(teacher, models[1].state_dict())
    content = {
        "state_dict": state,
        "pytorch-lightning_version": "2.5",
        "global_step": 12,
        "optimizer_states": [{"state": {0: {"exp_avg": randn(3)}}}],
    }
    found = imported(tmp_path, content)
    assert (found.layout, found.net, found.step) == ("lightning", "student", 12)
    assert_same(found.backbone, models[0].forward_features(IMAGE))
    if teacher:
        other = imported(tmp_path, content, net="teacher")
        assert_same(other.backbone, models[1].forward_features(IMAGE))
        assert other.net == "teacher"


@pytest.mark.parametrize("envelope", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_envelopes_anywhere(tmp_path, envelope):
    model = vit()
    state = {k.replace("blocks.", f"blocks.{envelope}"): v for k, v in model.state_dict().items()}
    found = imported(tmp_path, {"model": prefixed(envelope, state)})
    assert_same(found.backbone, model.forward_features(IMAGE))


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "method"), [("mae", "plain"), ("dino", "dino")])
def test_another_size_is_resized_as_the_authors_do(tmp_path, layout, method):
    model = vit()
    wishes = Wishes(heads=3, img_size=56)
    found = imported(tmp_path, model.state_dict(), wishes, layout=layout).backbone
    assert found.spec.grid == (7, 7)
    expected = resize_positions(model.pos_embed, (4, 4), (7, 7), 1, method)
    assert torch.equal(found.vit.pos_embed, expected)


def test_a_grid_that_is_no_square(tmp_path):
    with pytest.raises(UserError, match="13 positions are no square grid; give --grid"):
        imported(tmp_path, vit(img_size=(24, 32)).state_dict())
    model = vit(img_size=(24, 40))
    found = imported(tmp_path, model.state_dict(), Wishes(heads=3, grid=(3, 5))).backbone
    image = randn(2, 3, 24, 40)
    torch.testing.assert_close(
        joined(found, image), model.forward_features(image), atol=5e-6, rtol=0
    )
    with pytest.raises(UserError, match="--grid 2 5 does not fit 16 positions"):
        imported(tmp_path, model.state_dict(), Wishes(heads=3, grid=(2, 5)))


def test_fixed_positions_are_known_either_way_round(tmp_path):
    state = vit().state_dict()
    for name, rows_first in (("sincos", False), ("sincos_rows_first", True)):
        table = torch.cat([torch.zeros(1, 24), sincos(24, (4, 4), rows_first=rows_first)])
        found = imported(tmp_path, state | {"pos_embed": table[None]})
        assert found.backbone.config["positions"] == name
    assert imported(tmp_path, state).backbone.config["positions"] == "learned"


def test_what_is_written_is_read_by_us_and_by_timm(tmp_path):
    model = vit()
    found = imported(tmp_path, model.state_dict())
    write_imported(found, tmp_path / "file.pth", tmp_path / "out", {"mean": [0.5] * 3})
    backbone, sheet = load_backbone(tmp_path / "out")
    assert_same(backbone, model.forward_features(IMAGE))
    assert sheet["data"] == {"mean": [0.5] * 3, "std": [0.229, 0.224, 0.225], "size": 32}
    assert sheet["origin"]["layout"] == "timm"
    assert sheet["origin"]["file"] == "file.pth"
    assert len(sheet["origin"]["sha256"]) == 64
    recipe = sheet["timm"]
    path = tmp_path / "out" / "backbone.safetensors"
    other = timm.create_model(recipe["name"], checkpoint_path=str(path), **recipe["arguments"])
    assert_same(backbone, other.eval().forward_features(IMAGE))
    assert SIZES["depth"] == len(other.blocks)
