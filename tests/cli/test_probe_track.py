"""`contramask probe track` on tiny videos."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from contramask.checkpoints.export import export_backbone
from contramask.cli.probe import main
from contramask.models.vit import VisionTransformer
from contramask.types import UserError
from tests.probes.moving import SIZE, write_set

pytestmark = pytest.mark.filterwarnings(
    r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning",
    "ignore:The 'val_dataloader' does not have many workers",
)
QUIET = [
    "--trainer.accelerator", "cpu", "--trainer.devices", "1",
    "--trainer.enable_progress_bar", "false",
]  # fmt: skip


def exported(folder: Path, *, size: int = 32, **options) -> Path:
    """A backbone trained for images of 32 x 32 pixels."""
    sizes = {"img_size": 32, "patch_size": 4}
    timm = {"embed_dim": 24, "depth": 2, "num_heads": 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = VisionTransformer("vit_tiny_patch16_224", **sizes, timm=timm, **options)
    data = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "size": size}
    export_backbone(backbone.eval(), folder, net="student", step=7, data=data)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return exported(tmp_path_factory.mktemp("run"))


@pytest.fixture
def videos(tmp_path) -> Path:
    root = write_set(tmp_path / "squares", {"a": 5, "b": 3})
    write_set(root, {"still": 1}, split="more")
    listed = root / "ImageSets" / "2017"
    (listed / "val.txt").write_text("a\nb\nstill\n")
    return root


def test_a_model_is_tracked(run, videos, tmp_path, capsys):
    out = tmp_path / "results" / "mine.json"
    options = ["--short_side", str(SIZE[0]), "--deltas", "[1, 2]", "--masks", "true"]
    main(["track", str(run), "--videos", str(videos), *options, "--out", str(out), *QUIET])
    result = json.loads(out.read_text())
    values = result["values"]
    assert (result["probe"], result["step"], result["net"]) == ("track", 7, "student")
    # Objects of one colour that move by a patch or half of one: easy, but no pixel is exact.
    assert 0.9 < values["j_rate"] < 1
    assert 0.9 < values["f_rate"] < 1
    mean = (values["j_rate"] + values["f_rate"]) / 2
    assert values["jf_rate"] == pytest.approx(mean, abs=1e-6)
    assert values["instance_delta1_chance_rate"] == 0.5
    assert (values["videos"], values["skipped_videos"], values["objects"]) == (2, 1, 4)
    assert result["skipped"] == {"still": "it has one frame only"}
    assert result["videos"]["a"]["objects"]["5"]["j_mean"] > 0.9
    assert "48 x 68" in result["protocol"]
    assert "set val of squares at 480p" in result["protocol"]
    folder = tmp_path / "results" / "mine.json.parts"
    with Image.open(folder / "a" / "00004.png") as mask:
        assert (mask.mode, mask.size) == ("P", SIZE[::-1])
    told = capsys.readouterr().out
    assert "jf_rate" in told
    assert f"{100 * values['jf_rate']:.2f} %" in told
    assert f"masks in {folder}/VIDEO/" in told


def test_results_of_any_name_have_a_folder_each(run, videos, tmp_path):
    command = ["track", str(run), "--videos", str(videos), "--short_side", "24", "--limit", "1"]
    for name in ("foo", "dino.v1", "dino.v2"):
        main([*command, "--out", str(tmp_path / "r" / name), *QUIET])
        assert json.loads((tmp_path / "r" / name).read_text())["probe"] == "track"
    folders = {path.name for path in (tmp_path / "r").iterdir() if path.is_dir()}
    assert folders == {"foo.parts", "dino.v1.parts", "dino.v2.parts"}


def test_frames_have_their_own_size_whatever_the_model_was_trained_at(videos, tmp_path):
    """Images of no whole number of patches in training do not matter; the colours do."""
    folder = exported(tmp_path / "odd", size=30)
    command = ["track", str(folder), "--videos", str(videos), "--short_side", "24", *QUIET]
    results = []
    for name, given in (("as", []), ("other", ["--images.mean", "[0.1, 0.9, 0.5]"])):
        main([*command, *given, "--out", str(tmp_path / name)])
        results.append(json.loads((tmp_path / name).read_text())["values"])
    assert results[0] != results[1]


def test_the_result_lies_beside_the_run(run, videos):
    options = ["--short_side", "24", "--source", "block_00", "--norm", "none", "--limit", "1"]
    main(["track", str(run), "--videos", str(videos), *options, *QUIET])
    result = json.loads((run / "probes" / "track-block_00-none.json").read_text())
    assert "patches: block_00, norm none" in result["protocol"]
    assert "24 x 32 pixels" in result["protocol"]


def test_a_backbone_that_knows_one_grid_sees_frames_of_that_size(videos, tmp_path):
    """Relative positions (SimMIM, BEiT) are not resampled."""
    folder = exported(tmp_path / "relative", positions="relative")
    command = ["track", str(folder), "--videos", str(videos), "--short_side", "32", *QUIET]
    with pytest.raises(UserError, match="knows the whole grid"):
        main(command)
    main([*command, "--long_side", "32"])
    result = json.loads((folder / "probes" / "track.json").read_text())
    assert "long side 32: 32 x 32 pixels" in result["protocol"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--set", "train"], "train.txt cannot be read"),
        (["--resolution", "1080p"], "a has no frames; a is in the set"),
        (["--short_side", "2"], "less than a patch of 4"),
        (["--topk", "100000"], "topk is 100000; the context has"),
        (["--topk", "0"], "topk is 0; it is at least 1"),
        (["--deltas", "[0]"], "deltas is 0"),
        (["--source", "block_09"], "the backbone has 2 blocks"),
        (["--similarity", "near"], "near"),
        (["--radios", "3"], "did you mean radius"),
        (["--limit", "0"], "limit is 0"),
        (["--images.size", "64"], "images.size is given; allowed are mean, std; set --images.mean"),
        (["--images", "{size: 64, resize: 72}"], "images.size is given; allowed are mean, std"),
        (["--trainer.precision", "bf16-true"], "precision is bf16-true; features are float32"),
    ],
)
def test_mistakes_are_told(run, videos, tmp_path, options, told):
    out = ["--out", str(tmp_path / "x.json"), "--short_side", "24"]
    with pytest.raises(UserError, match=told):
        main(["track", str(run), "--videos", str(videos), *out, *options, *QUIET])
    assert not (tmp_path / "x.json").exists()
