"""`contramask probe linear`: a grid on stored features; alone it is the linear evaluation."""

import json
from pathlib import Path

import pytest

from contramask.checkpoints.export import export_backbone
from contramask.cli import probe_linear, probe_linear_augmented
from contramask.cli.probe_linear import main
from contramask.data.examples import Images
from contramask.data.module import ImageShards
from contramask.probes.linear import LinearRecipe
from contramask.training.clean_loaders import CleanImages
from contramask.training.linear import LinearEvaluation
from contramask.training.stored import Extraction
from contramask.types import UserError
from tests.builders import tiny_vit
from tests.training.test_linear import trainer

# pytorch-lightning's own use of torch.utils._pytree
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.1]
SHEET = {"mean": MEAN, "std": STD, "size": 16}
FEW = ["--recipe.rates", "[0.1, 1.0]", "--recipe.epochs", "5", "--limit", "90"]
RECIPE = LinearRecipe(rates=(0.1, 1.0), epochs=5)


@pytest.fixture
def run(tmp_path) -> Path:
    vit = tiny_vit(img_size=16)
    export_backbone(vit, tmp_path / "run", net="student", step=3, data=SHEET)
    return tmp_path / "run"


@pytest.fixture
def probe(run, data):
    """`probe(*options)`: run the command; the result."""

    def call(*options: str, name: str = "linear-last-cls-final") -> dict:
        quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
        sizes = ["--data.workers", "0", "--data.batch_size", "32"]
        main([str(run), *data, *sizes, *quiet, *FEW, *options])
        return json.loads((run / "probes" / f"{name}.json").read_text())

    return call


def test_alone_it_is_the_linear_evaluation(probe, shards, capsys):
    found = probe()
    data = ImageShards(
        shards["train"],
        val=shards["val"],
        batch_size=32,
        workers=0,
        images=Images(size=16, mean=tuple(MEAN), std=tuple(STD), min_side=4),
    )
    module = LinearEvaluation(
        tiny_vit(img_size=16), recipe=RECIPE, transform="resize 18, centre crop 16"
    )
    trainer().validate(module, datamodule=CleanImages(data, limit=90), verbose=False)
    expected = module.result
    assert found["values"] == pytest.approx(expected["values"])
    assert found["protocol"] == expected["protocol"]
    assert found["sweep"] == pytest.approx({str(k): v for k, v in expected["sweep"].items()})
    assert (found["probe"], found["step"], found["net"]) == ("linear", 3, "student")
    assert len(found["grid"]) == 1
    assert found["grid"][0] == found["default"]
    said = capsys.readouterr().out
    assert "linear probe of" in said
    assert "protocol: linear: batch norm" in said


GRID = [
    *("--sources", "[last, block_00]", "--pools", "[cls, mean]", "--norms", "[none, batch, layer]"),
    *("--fractions", "[1.0, 0.5]", "--per_class", "1"),
]


def test_a_grid_has_a_row_for_each_of_its_places(probe, capsys):
    found = probe(*GRID, name="linear-grid")
    rows = found["grid"]
    places = {
        (r["source"], r["pool"], r["vector_norm"], r["fraction"], r["per_class"]) for r in rows
    }
    assert len(rows) == len(places) == 2 * 2 * 3 * 3
    assert {(r["fraction"], r["per_class"]) for r in rows} == {(1.0, None), (0.5, None), (None, 1)}
    for row in rows:
        assert row["rate"] in RECIPE.rates
        assert 0 <= row["top1"] <= row["top5"] <= 1
        assert 0 <= row["held_out"] <= 1
        assert row["images"] == 64
        assert row["backbone_norm"] == "final"
        assert f"of {row['rows']} train images" in row["protocol"]
    whole = [r for r in rows if r["fraction"] == 1.0]
    best = max(r["held_out"] for r in whole)
    assert found["values"]["top1"] in {round(r["top1"], 6) for r in whole if r["held_out"] == best}
    assert found["default"] == rows[0]
    assert "best of the grid on held-out rows of train" in found["protocol"]
    assert any("have no image in" in note for note in found["notes"])
    said = capsys.readouterr().out
    assert "best rate of each place of the grid" in said
    assert "1 per class" in said
    assert "note: " in said


def test_features_are_stored_and_used_again(probe, run, monkeypatch):
    first = probe("--sources", "[last, block_00]", name="linear-grid")
    assert list((run / "probes" / "features").glob("train-*/pass-*/manifest.json"))

    def read(*_) -> None:
        raise AssertionError("extracted again")

    monkeypatch.setattr(Extraction, "validation_step", read)
    again = probe("--data.batch_size", "7")
    assert again["values"]["top1"] == first["grid"][0]["top1"]
    with pytest.raises(AssertionError, match="extracted again"):
        probe("--pools", "mean")


@pytest.mark.parametrize("cache", ["none", "elsewhere"])
def test_features_go_where_they_are_wanted(probe, run, tmp_path, cache):
    given = cache if cache == "none" else str(tmp_path / cache)
    probe("--cache", given)
    assert [p.name for p in (run / "probes").iterdir()] == ["linear-last-cls-final.json"]
    assert (tmp_path / "elsewhere").is_dir() == (cache == "elsewhere")


def test_a_preset_is_handed_over(monkeypatch):
    seen = []
    monkeypatch.setattr(probe_linear_augmented, "main", seen.append)
    for words in (["run", "--preset", "mae"], ["--preset=mae", "run"]):
        probe_linear.main(words)
        assert seen.pop() == words


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--norms", "batch", "--recipe.batch_norm", "false"], "--norms is batch and recipe.batch"),
        (["--fractions", "[0.0]"], "a fraction of the labels is 0.0; allowed"),
        (["--sources", "[block_02]"], "the backbone has 2 blocks, block_00 to block_01"),
        (["--sources", "first"], "source is 'first'; allowed are last, last4"),
        (["--pools", "[max]"], "max"),
        (["--recipe.holdout", "1.0"], "holdout is 1.0"),
        (["--trainer.limit_val_batches", "3"], "limit_val_batches is 3"),
        (["--source", "last"], "did you mean sources"),
    ],
)
def test_mistakes_are_told(probe, options, told):
    with pytest.raises(UserError, match=told):
        probe(*options)
