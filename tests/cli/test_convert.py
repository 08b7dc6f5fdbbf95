"""`contramask convert`: from a file of others to a probe, and from a run to timm."""

import argparse
import json

import pytest
import timm
import torch

from contramask.checkpoints.export import load_backbone
from contramask.cli.main import main
from tests.builders import randn

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.fixture
def file(tmp_path):
    """A training checkpoint in DINO's wrapper, with its arguments as an object."""
    torch.manual_seed(0)
    nets = [timm.create_model("vit_tiny_patch16_224", **SIZES, num_classes=0) for _ in range(2)]
    student, teacher = (
        {f"backbone.{k}": v for k, v in net.state_dict().items()}
        | {"head.last_layer.weight_v": randn(4, 3), "head.last_layer.weight_g": randn(4, 1)}
        for net in nets
    )
    content = {
        "student": {f"module.{k}": v for k, v in student.items()},
        "teacher": teacher,
        "dino_loss": {"center": randn(1, 4)},
        "args": argparse.Namespace(arch="vit"),
        "epoch": 3,
    }
    torch.save(content, tmp_path / "dino.pth")
    return tmp_path / "dino.pth", nets[1].eval()


def test_import_then_probe_then_export(file, data, tmp_path, capsys):
    path, teacher = file
    out = tmp_path / "weights"
    call = ["convert", "import", str(path), "--out", str(out), "--heads", "3"]
    main([*call, "--allow", "argparse.Namespace"])
    told = capsys.readouterr().out
    assert "dino, teacher" in told
    assert "name='vit_base_patch16_224', img_size=(32, 32)" in told
    assert "all used" in told
    for part in ("dino_loss", "args", "epoch", "student (32 tensors)", "teacher (2 tensors)"):
        assert part in told
    backbone, _ = load_backbone(out)
    x = randn(2, 3, 32, 32)
    torch.testing.assert_close(backbone.eval()(x).cls, teacher(x), atol=1e-6, rtol=0)

    main(["probe", "knn", str(out), *data, "--ks", "[3]", "--data.workers", "0"])
    result = json.loads(next((out / "probes").glob("knn-*.json")).read_text())
    assert 0 <= result["values"]["k3_top1"] <= 1

    capsys.readouterr()
    main(["convert", "export", str(out), "--format", "timm", "--out", str(tmp_path / "given")])
    call = capsys.readouterr().out.strip().splitlines()[-1]
    model = eval(call, {"timm": timm}).eval()
    torch.testing.assert_close(model(x), teacher(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "pass over them by --allow argparse.Namespace"),
        (["--allow", "os.system"], "only what is known to be harmless"),
        (["--allow", "argparse.Namespace", "--img_size", "30"], "no whole number of patches of 8"),
        (["--allow", "argparse.Namespace", "--layout", "moco"], "--layout may be"),
    ],
)
def test_a_mistake_is_one_line(file, tmp_path, capsys, options, told):
    path, _ = file
    out = tmp_path / "weights"
    with pytest.raises(SystemExit) as stop:
        main(["convert", "import", str(path), "--out", str(out), "--heads", "3", *options])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_size_pixels_and_network_are_options(file, tmp_path, capsys):
    path, _ = file
    call = ["convert", "import", str(path), "--out", str(tmp_path / "w"), "--heads", "3"]
    call += ["--allow", "argparse.Namespace", "--net", "student", "--img_size", "48"]
    main([*call, "--mean", "0.5", "0.5", "0.5", "--interpolation", "plain"])
    backbone, sheet = load_backbone(tmp_path / "w")
    assert backbone.spec.grid == (6, 6)
    assert backbone.config["interpolation"] == "plain"
    assert sheet["weights"]["net"] == "student"
    assert sheet["data"] == {"mean": [0.5] * 3, "std": [0.229, 0.224, 0.225], "size": 48}


def test_without_a_command_it_tells_its_options(capsys):
    main(["convert"])
    told = capsys.readouterr().out
    assert "import" in told
    assert "export" in told
    assert "examples" in told
