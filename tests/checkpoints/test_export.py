"""An exported backbone is the backbone, for us and for timm."""

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file

from contramask.checkpoints.export import SHEET, WEIGHTS, export_backbone, load_backbone
from contramask.models.vit import VisionTransformer
from contramask.types import UserError

DATA = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.1], "size": 40}
TINY = {"embed_dim": 24, "depth": 3, "num_heads": 2}


def make(**kwargs) -> VisionTransformer:
    torch.manual_seed(3)
    arguments = {"img_size": (32, 40), "patch_size": 8, "timm": TINY} | kwargs
    return VisionTransformer("vit_tiny_patch16_224", **arguments).eval()


@pytest.fixture
def image():
    return torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"positions": "sincos", "init": "mae"},
        {"timm": TINY | {"reg_tokens": 3, "no_embed_class": True, "init_values": 0.1}},
        {"positions": "relative", "init": "simmim"},
    ],
)
def test_comes_back_the_same(tmp_path, image, kwargs):
    backbone = make(**kwargs)
    if backbone.bias is not None:
        torch.nn.init.normal_(backbone.bias.relative_position_bias_table)
    export_backbone(backbone, tmp_path, net="student", step=7, data=DATA)
    again, sheet = load_backbone(tmp_path)
    assert sheet["step"] == 7
    assert sheet["data"] == DATA
    assert torch.equal(again.eval()(image).patch, backbone(image).patch)
    assert not list(tmp_path.glob("*.tmp*"))


def test_timm_loads_it_with_the_same_features(tmp_path, image):
    backbone = make(positions="sincos_rows_first", init="mocov3")
    export_backbone(backbone, tmp_path, net="teacher", step=1, data=DATA)
    recipe = yaml.safe_load((tmp_path / SHEET).read_text())["timm"]
    vit = timm.create_model(recipe["name"], **recipe["arguments"])
    vit.load_state_dict(load_file(tmp_path / WEIGHTS), strict=True)
    tokens = backbone(image)
    found = vit.eval().forward_features(image)
    torch.testing.assert_close(
        found, torch.cat([tokens.prefix, tokens.patch], 1), atol=1e-6, rtol=0
    )


def test_damage_is_named(tmp_path):
    backbone = make()
    weights = export_backbone(backbone, tmp_path, net="student", step=1, data=DATA)
    state = load_file(weights)
    state["norm.bias"] += 1
    save_file(state, weights)
    with pytest.raises(UserError, match=r"another checksum"):
        load_backbone(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r"no backbone\.safetensors"):
        load_backbone(tmp_path)


def test_a_sheet_cannot_name_foreign_classes(tmp_path):
    export_backbone(make(), tmp_path, net="student", step=1, data=DATA)
    sheet = yaml.safe_load((tmp_path / SHEET).read_text())
    sheet["class_path"] = "os.system"
    (tmp_path / SHEET).write_text(yaml.safe_dump(sheet))
    with pytest.raises(UserError, match=r"contramask\.models"):
        load_backbone(tmp_path)


def test_weights_of_another_architecture_are_refused(tmp_path):
    export_backbone(make(), tmp_path, net="student", step=1, data=DATA)
    sheet = yaml.safe_load((tmp_path / SHEET).read_text())
    sheet["init_args"]["timm"]["depth"] = 2
    (tmp_path / SHEET).write_text(yaml.safe_dump(sheet))
    with pytest.raises(UserError, match=r"does not fit"):
        load_backbone(tmp_path)
