"""`contramask analyze` and `compare`: from models and shards to one page, nothing done twice."""

import csv
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from contramask.analysis.attention import AttentionStatistics
from contramask.analysis.run import analyse
from contramask.analysis.study import Study
from contramask.checkpoints.export import export_backbone, load_backbone
from contramask.cli import analyze, compare, portraits
from contramask.data.examples import Images
from contramask.data.module import ImageShards
from contramask.models.vit import VisionTransformer
from contramask.types import UserError

SHEET = {"mean": [0.4, 0.5, 0.6], "std": [0.3, 0.2, 0.25], "size": 32}
QUICK = ["--batch_size", "24", "--workers", "0", "--device", "cpu", "--settings.replicates", "20"]
BARE = ["--report", "false"]  # figures take seconds
SMALL = [*QUICK, "--images", "40", "--settings.minibatch", "8"]
CORE = ["--analyses", "[cka,attention,geometry]", "--settings.cka", "[flat/raw]"]


def vit(seed: int, **sizes) -> VisionTransformer:
    torch.manual_seed(seed)
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3} | sizes
    return VisionTransformer("vit_tiny_patch16_224", img_size=32, patch_size=8, timm=sizes)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Runs `one` and `two`, `deep` with another depth and width, weights of timm's own names."""
    folder = tmp_path_factory.mktemp("models")
    for i, (name, sizes) in enumerate(
        {"one": {}, "two": {}, "deep": {"embed_dim": 36, "depth": 3}}.items()
    ):
        export_backbone(vit(i, **sizes), folder / name, net="student", step=7 + i, data=SHEET)
    for name, sizes in (("plain", {"embed_dim": 192}), ("odd", {})):
        state = vit(5, **sizes).state_dict().items()
        plain = {k.removeprefix("vit."): v.contiguous() for k, v in state}
        save_file(plain, folder / f"{name}.safetensors")
    return folder


def test_two_models_and_another_depth(models, shards, tmp_path):
    given = [f"first={models / 'one'}", str(models / "two"), str(models / "deep")]
    compare.main([*given, "--data", shards["val"], "--out", str(tmp_path), *SMALL])
    study = Study.read(tmp_path / "results.json")
    assert list(study.models) == ["first", "two", "deep"]
    assert study.models["two"]["step"] == 8
    assert study.models["two"]["images"] == study.data["images"] == 40
    maps = {pair: study.get("cka/flat/raw", *pair) for pair in study.pairs()}
    assert maps["first", "two"].value.shape == (20, 20)
    assert maps["first", "deep"].value.shape == (20, 30)
    torch.testing.assert_close(maps["deep", "deep"].value.diagonal(), torch.ones(30).double())
    assert study.get("cka/flat/raw/same_depth", "first", "two") is not None
    assert study.get("cka/flat/raw/same_depth", "first", "deep") is None
    assert any("2 blocks and deep 3" in note for note in study.notes)
    for name in ("agree/top1", "agree/tau", "agree/f1", "agree/top_channels"):
        assert study.get(name, "first", "two") is not None
    assert study.get("agree/top_channels", "first", "deep") is None  # channels of another width
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    row = next(r for r in rows if r["name"] == "attn/distance" and r["layer"] == "block_01")
    assert float(row["low"]) <= float(row["value"]) <= float(row["high"])
    assert row["unit"] == "px"
    page = (tmp_path / "report.html").read_text()
    assert "first" in page
    assert list((tmp_path / "figures").glob("*.svg"))


def test_numbers_are_those_of_the_function(models, shards, tmp_path):
    arguments = [str(models / "one"), "--data", shards["val"], "--out", str(tmp_path)]
    analyze.main([*arguments, *SMALL, *BARE, "--analyses", "[attention]"])
    assert not (tmp_path / "report.html").exists()
    images = Images(size=32, mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.25))
    data = ImageShards(shards["val"], batch_size=13, workers=0, images=images)
    backbone, _ = load_backbone(models / "one")
    batches = (data.to_device(b, "cpu") for b in data.clean_dataloader("train", limit=40))
    found = analyse(backbone, batches, {"": AttentionStatistics(replicates=20)})
    study = Study.read(tmp_path / "results.json")
    for name, reading in found.readings.items():
        other = study.get(name, "one")
        for mine, stored in ((reading.value, other.value), (reading.low, other.low)):
            torch.testing.assert_close(mine, stored, rtol=1e-5, atol=1e-7)


def test_channels_of_two_data_sets_and_another_size(models, shards, tmp_path):
    rest = ["--data", shards["val"], "--out", str(tmp_path), *SMALL, *BARE, "--size", "48"]
    options = ["--other_data", shards["train"], "--analyses", "[attention,geometry]"]
    analyze.main([str(models / "one"), *rest, *options])
    study = Study.read(tmp_path / "results.json")
    assert study.models["one"]["grid"] == [6, 6]
    overlap = study.get("repr/top_channels_overlap", "one")
    kept = study.get("repr/top_channels", "one")
    assert 0 <= overlap.value <= len(kept.value) == 6
    assert study.get("attn/distance", "one").value.max() < 48 * 2**0.5


def test_a_model_is_not_analysed_twice(models, shards, tmp_path, monkeypatch):
    one, two = str(models / "one"), str(models / "two")
    rest = ["--data", shards["val"], "--out", str(tmp_path), *SMALL, *CORE, *BARE]
    calls = []
    real = portraits.analyse

    def counted(backbone, *args, **kw):
        calls.append(backbone)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(backbone, *args, **kw)

    monkeypatch.setattr(portraits, "analyse", counted)
    with pytest.raises(KeyboardInterrupt):
        compare.main([one, two, *rest])
    assert (tmp_path / "models" / "one" / "portrait.json").is_file()
    compare.main([one, two, *rest])  # the second alone
    assert len(calls) == 3
    first = (tmp_path / "results.json").read_bytes()
    compare.main([one, two, *rest])  # neither
    assert len(calls) == 3
    assert (tmp_path / "results.json").read_bytes() == first
    (tmp_path / "models" / "two" / "portrait.safetensors").write_bytes(b"damaged")
    compare.main([one, two, *rest])
    assert len(calls) == 4
    compare.main([one, two, *rest, "--settings.minibatch", "10"])  # other settings: both
    assert len(calls) == 6


def test_weights_of_timm_names(models, shards, tmp_path):
    plain = models / "plain.safetensors"
    rest = ["--data", shards["val"], "--out", str(tmp_path), *SMALL, *CORE, *BARE]
    rest += ["--feed.size", "32"]
    with pytest.raises(UserError, match=r"heads.*contramask convert import"):  # 24 are nobody's
        analyze.main([str(models / "odd.safetensors"), *rest])
    analyze.main([f"mine=timm/vit_tiny_patch16_224={plain}", *rest])
    assert Study.read(tmp_path / "results.json").models["mine"]["depth"] == 2


def test_what_does_not_fit_is_noted_and_the_rest_goes_on(shards, tmp_path):
    blind = vit(3, class_token=False, global_pool="")
    export_backbone(blind, tmp_path / "blind", net="student", step=1, data=SHEET)
    rest = ["--data", shards["val"], "--out", str(tmp_path / "out"), *SMALL]
    ways = ["--settings.cka", "[cls/raw,mean/raw]", "--analyses", "[cka,attention]"]
    analyze.main([str(tmp_path / "blind"), *rest, *ways, *BARE])
    study = Study.read(tmp_path / "out" / "results.json")
    assert "cls/raw is left out" in study.notes[0]
    assert "no class token" in study.notes[0]
    assert study.get("cka/mean/raw", "blind", "blind") is not None
    assert study.get("attn/to_cls", "blind") is None
    all_there_are = [*rest, "--analyses", "[attention]", "--images", "1000"]
    analyze.main([str(tmp_path / "blind"), *all_there_are])
    assert "on 64 images" in (tmp_path / "out" / "report.html").read_text()
    few = [*rest, "--analyses", "[cka,attention]", "--images", "6"]
    analyze.main([str(tmp_path / "blind"), *few, *BARE])
    study = Study.read(tmp_path / "out" / "results.json")
    assert any("minibatch of 8" in note for note in study.notes)
    assert study.get("attn/distance", "blind") is not None


def test_a_model_that_cannot_be_fed_is_left_out(models, shards, tmp_path):
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3}
    odd = VisionTransformer("vit_tiny_patch16_224", img_size=30, patch_size=10, timm=sizes)
    export_backbone(odd, tmp_path / "odd", net="student", step=1, data=SHEET)
    rest = ["--data", shards["val"], "--out", str(tmp_path / "out"), *SMALL, *CORE, *BARE]
    compare.main([str(tmp_path / "odd"), f"lr=0.1={models / 'one'}", *rest])
    study = Study.read(tmp_path / "out" / "results.json")
    assert list(study.models) == ["lr"]
    assert "odd is left out" in study.notes[-1]
    with pytest.raises(UserError, match="patches of 10"):
        analyze.main([str(tmp_path / "odd"), *rest])


def test_mistakes(models, shards, tmp_path):
    one, rest = str(models / "one"), ["--data", shards["val"], *SMALL]
    with pytest.raises(UserError, match="2 and more"):
        compare.main([one, *rest])
    with pytest.raises(UserError, match=r"there is no .*nowhere.*NAME=PATH"):
        analyze.main([str(models / "nowhere"), *rest])
    with pytest.raises(UserError, match="no analysis 'attn'"):
        analyze.main([one, *rest, "--analyses", "[attn]"])
    with pytest.raises(UserError, match="no way 'flat/clean'"):
        analyze.main([one, *rest, "--settings.cka", "[flat/clean]"])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written.*--out"):
        analyze.main([one, *rest, "--out", str(tmp_path / "file")])
    with pytest.raises(UserError, match="no device 'quantum'"):
        analyze.main([one, "--data", shards["val"], "--device", "quantum", "--out", str(tmp_path)])
    with pytest.raises(UserError, match=r"30 pixels .* patches of 8; set --size"):
        analyze.main([one, *rest, "--size", "30", "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match="minibtch"):
        analyze.main([one, *rest, "--settings.minibtch", "4"])
