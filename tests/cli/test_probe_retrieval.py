"""`contramask probe retrieval` on small shards and a tiny backbone."""

import json

import pytest
import torch

from contramask.checkpoints.export import export_backbone
from contramask.cli.probe import main as probe
from contramask.cli.probe_retrieval import main
from contramask.models.vit import VisionTransformer
from contramask.types import UserError

pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A folder with a tiny backbone for images of 32 pixels, 4 x 4 patches."""
    folder = tmp_path_factory.mktemp("export")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3}
        backbone = VisionTransformer("vit_tiny_patch16_224", img_size=32, patch_size=8, timm=sizes)
    data = {"size": 32, "resize": 32, "mean": [0.5, 0.4, 0.6], "std": [0.25, 0.2, 0.3]}
    export_backbone(backbone, folder, net="student", step=7, data=data)
    return folder


@pytest.fixture
def plain(data) -> list[str]:
    return [*data, "--data.workers", "0", "--trainer.accelerator", "cpu", "--queries", "12"]


def test_all_tasks(export, plain, tmp_path, capsys):
    out = tmp_path / "found.json"
    asked = ["--warps", "[none, rotate5, noise40]", "--distractors", "30", "--copies", "3"]
    probe(["retrieval", str(export), *plain, *asked, "--limit", "50", "--out", str(out)])
    result = json.loads(out.read_text())
    values = result["values"]
    assert result["probe"] == "retrieval"
    assert result["step"] == 7
    assert values["patches_none_same_patch_rate"] > 0.9  # the inner product may prefer longer ones
    assert values["patches_noise40_same_patch_rate"] < values["patches_none_same_patch_rate"]
    assert values["patches_rotate5_queries"] == 12 * 16
    assert values["images_queries"] + values["images_queries_without_relevant"] == 50
    assert values["images_recall1_rate"] <= values["images_recall5_rate"] <= 1
    assert (values["copies_queries"], values["copies_database"]) == (36, 42)
    assert values["copies_map"] > 3 * values["copies_chance_recall1_rate"]
    assert "192 of the originals" in result["protocol"]
    shown = capsys.readouterr().out
    for word in ("rotate5", "same patch", "chance", "copies_micro_map", "protocol: retrieval"):
        assert word in shown
    assert "patches_rotate5" not in shown  # the table of warps tells them


def test_other_settings_and_the_default_place(export, plain):
    asked = ["--tasks", "[patches]", "--warps", "[shift8]", "--same", "place", "--metric", "l2"]
    main([str(export), *plain, *asked, "--cleaning", "zscore", "--source", "block_00"])
    folder = export / "probes"
    result = json.loads((folder / "retrieval-block_00-cls-final.json").read_text())
    assert set(result["parts"]) == {"patches_chance", "patches_shift8"}
    assert result["values"]["patches_shift8_queries"] == 12 * 9  # a row and a column are new
    assert "by l2 among" in result["protocol"]
    assert "of the same place" in result["protocol"]
    assert (folder / "retrieval-block_00-cls-final.json.parts" / "rank-0.jsonl").is_file()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--warps", "[turn5]"], "'turn5' is none of none, shift3"),
        (["--tasks", "[]"], "no task; there are patches, images, copies"),
        (["--queries", "0"], "queries are 1 or more"),
        (["--queries", "1"], r"1 image\(s\) for patches"),
        (["--cleaning", "top24", "--tasks", "[patches]"], "removes channels"),
        (["--metric", "hamming"], "hamming"),
        (["--distractor", "3"], "did you mean distractors"),
    ],
)
def test_mistakes_are_named(export, plain, tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        main([str(export), *plain, "--limit", "8", "--out", str(tmp_path / "x.json"), *options])
