"""What is handed out has the features of what was trained: for us, for timm, for ONNX."""

import importlib.util
import sys

import numpy as np
import pytest
import timm
import torch

from contramask.checkpoints import exporting
from contramask.checkpoints.architecture import Wishes
from contramask.checkpoints.export import export_backbone, load_backbone
from contramask.checkpoints.exporting import export
from contramask.checkpoints.importing import import_backbone
from contramask.models.vit import VisionTransformer
from contramask.types import UserError
from tests.builders import fit, pretraining, randn
from tests.checkpoints.convert_files import joined

DATA = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.1], "size": 16}
TINY = {"embed_dim": 24, "depth": 2, "num_heads": 3}
IMAGE = randn(3, 3, 16, 20)
KINDS = [
    {"positions": "sincos", "init": "mae"},
    {"positions": "sincos_rows_first", "init": "mocov3"},
    {"timm": TINY | {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.1}},
    {"timm": TINY | {"class_token": False, "global_pool": ""}},
    {"positions": "relative"},
    {"positions": "relative", "timm": TINY | {"init_values": 0.1, "drop_path_rate": 0.1}},
    {"positions": "relative", "timm": TINY | {"qkv_bias": False, "mlp_ratio": 2.0}},
    {"positions": "relative_per_block", "timm": TINY | {"init_values": 0.1}},
]


def made(**changes) -> VisionTransformer:
    arguments = {"img_size": (16, 20), "patch_size": 4, "timm": TINY} | changes
    backbone = VisionTransformer("vit_tiny_patch16_224", **arguments)
    with torch.no_grad():
        for i, parameter in enumerate(backbone.parameters()):
            parameter.add_(0.1 * randn(*parameter.shape, seed=i))
    return backbone.eval()


def folder(path, **changes):
    backbone = made(**changes)
    export_backbone(backbone, path, net="student", step=7, data=DATA)
    return backbone


def evaluated(call: str) -> torch.nn.Module:
    """The printed call, as a user would paste it."""
    return eval(call, {"timm": timm}).eval()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_timm_creates_it_by_the_printed_call(tmp_path, kind):
    backbone = folder(tmp_path, **kind)
    lines = export(tmp_path, form="timm")
    assert lines[0].startswith(f"student of {tmp_path}, after 7 steps")
    assert lines[-1].startswith("timm.create_model(")
    model = evaluated(lines[-1])
    relative = "relative" in str(kind)
    assert any("bias of the keys" in line for line in lines) == relative
    # Without it scores are rounded elsewhere, so the last digit of float32 may differ.
    found, limit = model.forward_features(IMAGE), 3e-6 if relative else 1e-6
    torch.testing.assert_close(found, joined(backbone, IMAGE), atol=limit, rtol=0)
    image = IMAGE.double()
    found = model.double().forward_features(image)
    torch.testing.assert_close(found, joined(backbone.double(), image), atol=1e-12, rtol=0)


def test_beit_cannot_hold_everything(tmp_path):
    folder(tmp_path, positions="relative", timm=TINY | {"qk_norm": True})
    with pytest.raises(UserError, match=r"Beit.* knows no qk_norm; use --format safetensors or"):
        export(tmp_path, form="timm")


def test_our_own_again(tmp_path):
    backbone = folder(tmp_path / "a")
    export(tmp_path / "a", out=tmp_path / "b")
    again, sheet = load_backbone(tmp_path / "b")
    assert torch.equal(joined(again, IMAGE), joined(backbone, IMAGE))
    assert (sheet["step"], sheet["data"], sheet["weights"]["net"]) == (7, DATA, "student")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A checkpoint of Lightning's, of a run with a student and a teacher that differ."""
    path = tmp_path_factory.mktemp("runs") / "tried"
    module = pretraining("moco")
    trainer = fit(module, steps=2)
    (path / "checkpoints").mkdir(parents=True)
    trainer.save_checkpoint(path / "checkpoints" / "step-2.ckpt")
    text = "model: {backbone: {class_path: %s.%s, init_args: {%s}}}"
    kind = type(module.backbone)
    arguments = "name: vit_tiny_patch16_224, img_size: [16, 20], patch_size: 4, timm: "
    arguments += "{embed_dim: 24, depth: 2, num_heads: 3}"
    (path / "config.yaml").write_text(text % (kind.__module__, kind.__qualname__, arguments))
    export_backbone(module.backbone, path, net="student", step=2, data=DATA)
    return path, module


@pytest.mark.parametrize("net", [None, "teacher", "student"])
@pytest.mark.parametrize("from_file", [False, True])
def test_student_and_teacher_of_a_run(run, tmp_path, net, from_file):
    path, module = run
    source = path / "checkpoints" / "step-2.ckpt" if from_file else path
    lines = export(source, net=net, out=tmp_path)
    chosen = net or "teacher"
    assert lines[0] == f"{chosen} of {source}, after 2 steps"
    backbone, sheet = load_backbone(tmp_path)
    expected = module.backbone if chosen == "student" else module.teacher.module
    assert torch.equal(joined(backbone, IMAGE), joined(expected, IMAGE))
    assert sheet["weights"]["net"] == chosen
    if not from_file:
        assert sheet["data"] == DATA
    other = module.teacher.module if chosen == "student" else module.backbone
    assert not torch.equal(joined(other, IMAGE), joined(expected, IMAGE))


def test_what_a_run_says_of_itself_is_not_overruled_in_silence(run):
    checkpoint = run[0] / "checkpoints" / "step-2.ckpt"
    with pytest.raises(UserError, match=r"its configuration says what it is; leave out"):
        import_backbone(checkpoint, wishes=Wishes(img_size=32))


def test_a_network_that_is_not_there(tmp_path):
    folder(tmp_path)
    with pytest.raises(UserError, match="holds the student alone and no checkpoint with the teac"):
        export(tmp_path, net="teacher")
    with pytest.raises(UserError, match=r"no .*none; give a run directory"):
        export(tmp_path / "none")


ONNX = [
    name for name in ("onnx", "onnxscript", "onnxruntime") if not importlib.util.find_spec(name)
]


@pytest.mark.skipif(bool(ONNX), reason=f"not installed: {', '.join(ONNX)} (uv sync --extra onnx)")
@pytest.mark.filterwarnings("ignore")  # torch's exporter warns of itself
@pytest.mark.parametrize("kind", [{}, {"positions": "relative"}], ids=str)
def test_onnx_computes_the_same_for_any_batch(tmp_path, kind):
    import onnxruntime

    backbone = folder(tmp_path, **kind)
    lines = export(tmp_path, form="onnx")
    assert "input image (B, 3, 16, 20)" in lines[-1]
    graph = onnxruntime.InferenceSession(tmp_path / "export" / "backbone.onnx")
    for batch in (1, 3):
        prefix, patch = graph.run(None, {"image": IMAGE[:batch].numpy()})
        found = torch.from_numpy(np.concatenate([prefix, patch], 1))
        torch.testing.assert_close(found, joined(backbone, IMAGE[:batch]), atol=1e-5, rtol=0)


def test_what_onnx_needs_is_told(tmp_path, monkeypatch):
    folder(tmp_path)
    find = importlib.util.find_spec
    gone = lambda name: None if name == "onnxscript" else find(name)  # noqa: E731
    monkeypatch.setattr(exporting.importlib.util, "find_spec", gone)
    monkeypatch.setattr(exporting, "NEEDED", ("sys", "onnxscript"))
    with pytest.raises(UserError, match=r"needs onnxscript: uv sync --extra onnx, or pip install"):
        export(tmp_path, form="onnx")
    assert "sys" in sys.modules
