"""`contramask probe linear`: a grid on stored features; alone it is the linear evaluation."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from contramask.checkpoints.export import export_backbone
from contramask.cli import probe_linear, probe_linear_augmented
from contramask.cli.probe_linear import main
from contramask.data.examples import Images
from contramask.data.module import ImageShards
from contramask.probes.features import Feature
from contramask.probes.grid_cells import Axes
from contramask.probes.grid_rows import Share
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

    def call(*options: str) -> dict:
        quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
        sizes = ["--data.workers", "0", "--data.batch_size", "32"]
        out = run / "result.json"
        main([str(run), *data, *sizes, *quiet, *FEW, "--out", str(out), *options])
        return json.loads(out.read_text())

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
        tiny_vit(img_size=16),
        recipe=RECIPE,
        transform="resize 18, centre crop 16, normalised by mean (0.5, 0.4, 0.3), std (0.2, 0.3, "
        "0.1)",
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
    found = probe(*GRID)
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
    first = probe("--sources", "[last, block_00]")
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
    assert not [*(run / "probes").iterdir()] if cache == "none" else not (run / "probes").exists()
    assert (tmp_path / "elsewhere").is_dir() == (cache == "elsewhere")


def test_two_probes_without_a_cache_have_a_folder_each_which_an_error_removes(
    probe, run, monkeypatch
):
    seen = []

    def broken(*_) -> None:
        seen.extend((run / "probes").glob("features*"))
        raise UserError("broken")

    monkeypatch.setattr(probe_linear, "train", broken)
    for _ in range(2):
        with pytest.raises(UserError, match="broken"):
            probe("--cache", "none")
    assert len(seen) == len(set(seen)) == 2
    assert not list((run / "probes").iterdir())


def test_the_forward_is_of_the_trainers_precision_and_the_protocol_says_so(probe, run):
    exact, mixed = (probe("--trainer.precision", p) for p in ("32-true", "bf16-mixed"))
    assert "precision" not in exact["protocol"]
    assert ", precision bf16-mixed; 64 val images" in mixed["protocol"]
    assert len(list((run / "probes" / "features").glob("train-*"))) == 2


def test_another_plan_is_another_file():
    half, layer = Share(0.5), ("layer",)
    several = Axes((Feature(), Feature(pool="mean")))
    axes = [Axes(), Axes(shares=(half,)), Axes(norms=layer), Axes(recipe=RECIPE), several]
    axes.append(replace(several, shares=(half,)))
    plain = {"limit": None, "images": None, "precision": "32-true"}
    names = [probe_linear.name_of(a, plain) for a in axes]
    changes = ({"limit": 9}, {"images": {"size": 16}}, {"precision": "bf16-mixed"})
    names += [probe_linear.name_of(Axes(), plain | c) for c in changes]
    assert len(set(names)) == len(names)
    assert names[0] == "linear-last-cls-final"
    assert [i for i, name in enumerate(names) if name.startswith("linear-grid-")] == [4, 5]


def test_the_result_lies_beside_the_run_under_that_name(run, monkeypatch, probe):
    written = []
    monkeypatch.setattr(probe_linear, "write_result", lambda _, out: written.append(out))
    with pytest.raises(FileNotFoundError):
        probe("--out", "null")
    (out,) = written
    assert out.parent == run / "probes"
    assert out.name.startswith("linear-last-cls-final-")  # FEW is not the default


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
