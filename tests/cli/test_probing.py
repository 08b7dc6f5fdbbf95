"""What all probes share: how a model is fed, and that a mistake is told before anything runs."""

import json
from pathlib import Path

import pytest

from contramask.checkpoints.export import export_backbone
from contramask.cli.probe import main as probe
from contramask.cli.probing import (
    images_of,
    is_share,
    make_trainer,
    normalised,
    open_model,
    parts_of,
    positional,
    write_result,
)
from contramask.data.examples import Images
from contramask.models.vit import VisionTransformer
from contramask.types import UserError

SHEET = {"mean": [0.4, 0.5, 0.6], "std": [0.3, 0.2, 0.25], "size": 24, "resize": 30}


def test_a_model_is_fed_as_in_training_unless_something_else_is_asked_for():
    mean, std = (0.4, 0.5, 0.6), (0.3, 0.2, 0.25)
    assert images_of(SHEET, None, 4) == Images(24, 30, mean, std, min_side=4)
    assert images_of(SHEET, {"resize": 28}, 4) == Images(24, 28, mean, std, min_side=4)
    # Another size keeps the normalisation; what was resized to goes with the size.
    assert images_of(SHEET, {"size": 32}, 8) == Images(32, None, mean, std, min_side=8)
    given = {"mean": [0, 0, 0], "classes": 3, "min_side": 40}
    assert images_of(SHEET, given, 4) == Images(24, 30, (0.0, 0.0, 0.0), std, 40, 3)
    old = {k: v for k, v in SHEET.items() if k != "resize"}
    assert images_of(old, {}, 6).resize is None


@pytest.mark.parametrize(
    ("given", "patch", "told"),
    [
        ({"size": 30}, 4, "30 pixels are no whole number of patches of 4; set --images.size"),
        ({"sice": 32}, 4, "images.sice is given; allowed are size, resize, mean"),
    ],
)
def test_what_cannot_be_fed(given, patch, told):
    with pytest.raises(UserError, match=told):
        images_of(SHEET, given, patch)


PATCHES = ("size", "mean", "std", "min_side")


@pytest.mark.parametrize(
    ("given", "allowed", "told"),
    [
        ({"resize": 40}, PATCHES, "resize is given; allowed are size, mean, std, min_side; set --"),
        ({"mean": [0, 0, 0], "classes": 9}, PATCHES, "images.classes is given; allowed are size"),
        ({"size": 32}, ("mean", "std"), "size is given; allowed are mean, std; set --images.mean"),
        ({"size": 30}, PATCHES, "30 pixels are no whole number of patches of 4"),
    ],
)
def test_what_a_command_does_not_read_is_refused(given, allowed, told):
    with pytest.raises(UserError, match=told):
        images_of(SHEET, given, 4, allowed)


def test_where_sizes_are_not_read_any_will_do():
    sheet = SHEET | {"size": 30}
    assert images_of(sheet, {"std": [1, 1, 1]}, 4, ("mean", "std")).std == (1.0, 1.0, 1.0)
    with pytest.raises(UserError, match="30 pixels are no whole number"):
        images_of(sheet, None, 4)


@pytest.mark.parametrize(
    ("kind", "allowed"),
    [
        ("track", "mean, std"),
        ("patches", "size, mean, std, min_side"),
        ("retrieval", "size, resize, mean, std, min_side, classes"),
    ],
)
def test_the_help_says_what_a_command_reads(kind, allowed, capsys):
    with pytest.raises(SystemExit):
        probe([kind, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert f"{allowed}; what is not given is as the run was fed" in told


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", 64])
def test_weights_that_are_not_float32_are_refused(precision):
    with pytest.raises(UserError, match=r"-true; features are float32: .* bf16-mixed$"):
        make_trainer({"accelerator": "cpu", "precision": precision})


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true", None])
def test_other_precisions_are_not(precision):
    made = make_trainer({"accelerator": "cpu", "precision": precision})
    assert made.precision == (precision or "32-true")


def test_parts_lie_beside_the_result_under_a_name_of_their_own():
    names = {parts_of(Path("r") / name).name for name in ("a", "a.json", "a.v1", "a.v2")}
    assert names == {"a.parts", "a.json.parts", "a.v1.parts", "a.v2.parts"}
    assert parts_of(Path("r/a")).parent == Path("r")


def test_a_model_says_what_goes_into_its_results(tmp_path):
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3}
    vit = VisionTransformer("vit_tiny_patch16_224", img_size=24, patch_size=8, timm=sizes)
    export_backbone(vit, tmp_path / "run", net="teacher", step=9, data=SHEET)
    opened = open_model(str(tmp_path / "run"), {"size": 16})
    assert opened.about["step"] == 9
    assert opened.about["net"] == "teacher"
    assert len(opened.about["backbone"]) == 64
    as_fed = "normalised by mean (0.4, 0.5, 0.6), std (0.3, 0.2, 0.25)"
    assert opened.transform == f"resize 18, centre crop 16, {as_fed}"
    assert opened.folder == tmp_path / "run" / "probes"
    assert not any(p.requires_grad for p in opened.backbone.parameters())
    plain = open_model(str(tmp_path / "run"))
    assert plain.transform == f"resize 30, centre crop 24, {as_fed}"


def test_a_transform_says_how_images_are_normalised_where_that_is_not_imagenets():
    assert normalised(Images(size=16)) == ""
    fed = Images(mean=(0.5, 0.5, 0.25), std=(0.229, 0.224, 0.225))
    told = ", normalised by mean (0.5, 0.5, 0.25), std (0.229, 0.224, 0.225)"
    assert normalised(fed) == told


def test_names_of_shares():
    assert is_share("k20_top1")
    assert is_share("jf_rate")
    assert not is_share("rate")
    assert not is_share("images")


def test_the_run_may_come_first():
    assert positional(["runs/x", "--a", "1"]) == ["--run", "runs/x", "--a", "1"]
    assert positional(["--a", "1"]) == ["--a", "1"]
    assert positional([]) == []


def test_a_result_is_one_file_or_a_line_that_says_why_not(tmp_path):
    write_result({"values": {"top1": 0.5}}, tmp_path / "new" / "x.json")
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == {"values": {"top1": 0.5}}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_result({}, tmp_path / "file" / "x.json")
