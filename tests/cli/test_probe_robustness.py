"""`contramask probe robustness` on tiny shards and on real cue-conflict images."""

import json
import logging
from pathlib import Path

import pytest
import torch

from contramask.checkpoints.export import export_backbone
from contramask.cli import probe_robustness
from contramask.cli.probe import main
from contramask.data.procedural import write_shards
from contramask.models.vit import VisionTransformer
from contramask.types import UserError
from tests.training.test_robustness import write_cues

pytestmark = pytest.mark.filterwarnings(
    r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning",
    "ignore:The 'val_dataloader' does not have many workers",
)
QUIET = [
    "--trainer.accelerator", "cpu", "--trainer.devices", "1",
    "--trainer.enable_progress_bar", "false", "--data.workers", "0",
    "--recipe.rates", "[1.0]", "--recipe.epochs", "40", "--pool", "mean",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A random backbone for images of 32 x 32 pixels."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        timm = {"embed_dim": 24, "depth": 1, "num_heads": 3}
        backbone = VisionTransformer("vit_tiny_patch16_224", img_size=32, patch_size=8, timm=timm)
    sheet = {"mean": [0.4, 0.5, 0.3], "std": [0.25, 0.2, 0.3], "size": 32, "resize": 32}
    export_backbone(backbone.eval(), folder, net="student", step=7, data=sheet)
    return folder


@pytest.fixture(autouse=True)
def _own_log():
    """Commands log to the stream there is when the first of them runs: here one for each test."""
    log = logging.getLogger("contramask")
    before = (log.handlers[:], log.propagate, log.level)
    log.handlers.clear()
    yield
    log.handlers[:], log.propagate = before[:2]
    log.setLevel(before[2])


def probe(run: Path, *options: object) -> None:
    main(["robustness", str(run), *QUIET, *map(str, options)])


def test_degradations_of_a_model(run, shards, tmp_path, capsys):
    """Random features know nothing of new images: the images that were learnt are degraded."""
    out, words = tmp_path / "results" / "mine.json", "[noise30, freq0.5, lowpass4, shuffle2]"
    data = ("--data.train", shards["train"], "--data.val", shards["train"])
    options = (*data, "--degradations", words, "--k", "5")
    probe(run, *options, "--out", out)
    result = json.loads(out.read_text())
    assert (result["probe"], result["step"], result["net"]) == ("robustness", 7, "student")
    values, table = result["values"], {row["word"]: row for row in result["degradations"]}
    assert list(table) == ["clean", "noise30", "freq0.5", "lowpass4", "shuffle2"]
    for word, row in table.items():
        assert values[f"{word}_top1"] == row["top1"]
        lost = (values["clean_top1"] - row["top1"]) / values["clean_top1"]
        assert row["relative_drop"] == pytest.approx(lost)
    for word in ("noise30", "lowpass4"):
        assert table[word]["top1"] < table["clean"]["top1"]
        assert table[word]["k5_top1"] < table["clean"]["k5_top1"]
    assert values["images"] == 256
    assert values["clean_top1"] > 5 / 64  # of 64 classes
    assert "normalised by mean (0.4, 0.5, 0.3)" in result["protocol"]
    shown = capsys.readouterr().out
    assert "noise30" in shown
    assert "lost of clean" in shown
    assert out.with_suffix(".png").stat().st_size > 10_000
    # Everything is done: the same again from what is kept, beside the first result.
    again = tmp_path / "results" / "again.json"
    for half in tmp_path.glob("results/*.parts"):
        half.rename(half.with_name(half.name.replace("mine", "again")))
    probe(run, *options, "--out", again, "--beside", f"[{out}]")
    assert json.loads(again.read_text()) == result
    named = f"{Path(run).parent.name}/tiny"  # two models of one name
    assert named in again.with_suffix(".svg").read_text()


@pytest.mark.parametrize("indexed", [True, False])
def test_parts_of_other_degraded_images_are_not_reused(run, tmp_path, monkeypatch, indexed):
    """What is kept is made a result that nothing measures: it is shown, or measured anew."""
    shards, out = tmp_path / "shards", tmp_path / "found.json"
    kept = tmp_path / "found-degradations.parts"

    def write(seed: int) -> dict[str, str]:
        found = write_shards(shards, images=64, val_images=64, size=32, shards=1, seed=seed)
        for index in shards.glob("*.index.json") if not indexed else ():
            index.unlink()
        return found

    data = write(0)
    options = ["--data.train", data["train"], "--data.val", data["val"], "--out", out]
    options += ["--recipe.epochs", "1"]

    def images(*changes: str) -> int:
        probe(run, *options, "--degradations", "[]", *changes)
        return json.loads(out.read_text())["values"]["images"]

    assert images() == 64
    marked = kept.read_text().replace('"images": 64', '"images": 77')
    assert marked != kept.read_text()
    changes = [["--trainer.precision", "bf16-mixed"], ["--trainer.limit_val_batches", "1"]]
    for change in [[], *changes] if indexed else [[]]:
        kept.write_text(marked)
        assert (images(*change) == 77) == (not change)
    kept.write_text(marked)
    with monkeypatch.context() as patch:
        patch.setattr(probe_robustness, "FORMAT", "of tomorrow")
        assert images() == 64
    names = shards / "classes.json"
    before = names.read_text()
    names.write_text(json.dumps([f"class {n}" for n in range(64)]))
    kept.write_text(marked)
    assert images() == 64
    names.write_text(before)
    kept.write_text(marked)
    assert images() == 77
    write(1)
    kept.write_text(marked)
    assert images() == 64


def test_parts_of_other_cues_are_not_reused(run, tmp_path):
    paths, out = write_cues(tmp_path), tmp_path / "found.json"
    kept = tmp_path / "found-cues.parts"
    options = ["--cue.data", paths["cue"], "--cue.train", paths["photos"], "--cue.folds", "2"]
    options += ["--recipe.epochs", "1"]

    def images() -> int:
        probe(run, *options, "--out", out)
        return json.loads(out.read_text())["values"]["cue_images"]

    assert images() == 36
    marked = kept.read_text().replace('"conflict": 36', '"conflict": 77')
    kept.write_text(marked)
    assert images() == 77
    names = Path(paths["photos"]).parent / "classes.json"
    before = names.read_text()
    names.write_text(before.replace("fish", "oven"))
    kept.write_text(marked)
    assert images() == 36
    names.write_text(before)
    kept.write_text(marked)
    assert images() == 77
    write_cues(tmp_path, sources=False)  # of other keys
    kept.write_text(marked)
    assert images() == 36


def test_the_default_sweep_fits_the_images(run, data, tmp_path):
    out = tmp_path / "all.json"
    probe(run, *data, "--limit", "8", "--out", out, "--seed", "3")
    words = [row["word"] for row in json.loads(out.read_text())["degradations"]]
    assert len(words) == 26
    assert {"blur1.14", "freq1", "highpass8", "shuffle8"} < set(words)
    assert "seed 3, key" in json.loads(out.read_text())["protocol"]


def test_real_cues_alone_and_with_photographs(run, shared_data, tmp_path, capsys):
    cues = shared_data("cue-conflict") / "train-000000.tar"
    photographs = shared_data("cifar10") / "train-000000.tar"
    out = tmp_path / "cues.json"
    options = ("--cue.data", cues, "--limit", "90", "--cue.folds", "3", "--out", out)
    probe(run, *options, "--cue.train", photographs)
    result = json.loads(out.read_text())
    values = result["values"]
    assert 75 < values["cue_images"] < 90  # those that conflict
    for cue in ("shape", "texture"):
        assert len(result["cues"]["splits"]["source"][cue]["folds"]) == 3
        assert 0 <= values[f"{cue}_top1"] < 0.6
        assert 1 / 16 <= values[f"{cue}_chance_top1"] < 0.1
    # CIFAR-10 and cue-conflict share five names.
    assert result["shape_bias"]["classes"] == ["airplane", "bird", "cat", "dog", "truck"]
    assert 0 <= values["shape_bias_rate"] <= 1
    assert "degradations" not in result
    shown = capsys.readouterr().out
    assert "source pictures" in shown
    assert "shape_bias_rate" in shown
    assert not out.with_suffix(".png").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "nothing to measure; give --data.train and --data.val"),
        (["--data.train", "x.tar"], "data.val is missing"),
        (["--data.val", "x.tar"], "data.train is missing"),
        (["--cue.data", "x.tar", "--degradations", "[blur2]"], "without images to degrade"),
        (["--data.train", "x", "--data.val", "x", "--cue.train", "x"], "without --cue.data"),
        (["--cue.data", "nowhere-0.tar"], "cue.data"),
        (["--cue.data", "x.tar", "--cue.folds", "1"], "cue.folds is 1"),
        (["--cue.data", "x.tar", "--cue.split", "half"], "half"),
        (["--cue.data", "x.tar", "--cue.fold", "3"], "did you mean cue.folds"),
        (["--data.train", "x", "--data.val", "x", "--degradations", "[fog]"], "'fog' is none"),
        (
            ["--data.train", "x", "--data.val", "x", "--degradations", "[shuffle3]"],
            "shuffle3 needs sides that 3 divides; images have 32 x 32 pixels",
        ),
        (["--cue.data", "x", "--beside", "[nowhere.json]"], "--beside: nowhere.json is no result"),
    ],
)
def test_mistakes_are_told_in_one_line(run, options: list[str], told: str):
    with pytest.raises(UserError) as error:
        probe(run, *options)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_shards_without_both_cues_are_refused(run, shards):
    """The procedural shards name shape and texture too, but their label is neither."""
    with pytest.raises(UserError, match=r"samples are bad .*the shape"):
        probe(run, "--cue.data", shards["val"], "--data.streaming.grace", "0")
