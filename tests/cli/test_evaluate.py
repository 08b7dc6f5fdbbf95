"""`contramask evaluate`: a suite as one table, nothing done twice, and runs that still go on."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml

from contramask.checkpoints.export import export_backbone, load_backbone
from contramask.checkpoints.files import write
from contramask.checkpoints.sources import Source
from contramask.cli import evaluate, evaluation_suite, probe_knn
from contramask.cli.evaluation_suite import load_suite
from contramask.cli.evaluation_table import Evaluation
from contramask.cli.watching import Watch
from contramask.data.sources import expand
from contramask.models.vit import VisionTransformer
from contramask.types import UserError

SHEET = {"mean": [0.4, 0.5, 0.6], "std": [0.3, 0.2, 0.25], "size": 32, "resize": 32}
SUITE = {
    "entries": {
        "near": {
            "verb": "probe knn",
            "needs": {"data.train": "train", "data.val": "val"},
            "options": {"ks": [1, 3], "pool": "mean"},
            "columns": {"1-NN": "k1_top1", "3-NN": "k3_top1"},
        },
        "many": {  # more neighbours than images
            "verb": "probe knn",
            "needs": {"data.train": "train", "data.val": "val"},
            "options": {"ks": [5000], "temperature": 0.1},
            "columns": {"5000-NN": "k5000_top1"},
        },
        "videos": {
            "verb": "probe track",
            "needs": {"videos": "videos"},
            "columns": {"J&F": "jf_rate"},
        },
    }
}
SHARED = "{trainer: {accelerator: cpu, devices: 1}, data: {workers: 0, batch_size: 32}}"


def vit(seed: int, heads: int = 3) -> VisionTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = {"embed_dim": 24, "depth": 2, "num_heads": heads}
        return VisionTransformer("vit_tiny_patch16_224", img_size=32, patch_size=8, timm=sizes)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for i, name in enumerate(("one", "two")):
        export_backbone(vit(i), folder / name, net="student", step=7 + i, data=SHEET)
    (folder / "suite.yaml").write_text(yaml.safe_dump(SUITE, sort_keys=False))
    return folder


def arguments(models: Path, shards: dict[str, str], out: Path, *more: str) -> list[str]:
    return [
        *("--suite", str(models / "suite.yaml"), "--out", str(out), "--shared", SHARED),
        *("--data.train", shards["train"], "--data.val", shards["val"], *more),
    ]


def test_one_row_a_model_and_nothing_twice(models, shards, tmp_path, monkeypatch, capsys):
    given = [f"first={models / 'one'}", str(models / "two")]
    evaluate.main([*given, *arguments(models, shards, tmp_path)])
    rows = list(csv.DictReader((tmp_path / "evaluation.csv").read_text().splitlines()))
    assert [row["model"] for row in rows] == ["first", "two"]
    assert set(rows[0]) >= {"1-NN", "3-NN"}
    content = json.loads((tmp_path / "evaluation.json").read_text())
    alone = tmp_path / "alone.json"
    plain = ["--trainer.accelerator", "cpu", "--data.workers", "0", "--data.batch_size", "32"]
    data = ["--data.train", shards["train"], "--data.val", shards["val"]]
    probe_knn.main(
        [str(models / "two"), *data, *plain, "--ks", "[1,3]", "--pool", "mean", "--out", str(alone)]
    )
    expected = json.loads(alone.read_text())["values"]
    assert content["results"]["two"]["near"]["values"] == expected
    assert float(rows[1]["3-NN"]) == expected["k3_top1"]
    assert "videos is left out: give --data.videos" in content["notes"]
    text = (tmp_path / "evaluation.md").read_text()
    assert f"| {100 * expected['k1_top1']:.1f} |" in text
    assert "near (first, two): k-NN: cosine" in text
    capsys.readouterr()

    def called(argv):
        raise AssertionError(f"done again: {argv}")

    monkeypatch.setattr(probe_knn, "main", called)
    options = arguments(models, shards, tmp_path, "--only", "[near]")
    evaluate.main([*given, *options])
    again = json.loads((tmp_path / "evaluation.json").read_text())
    assert again["results"]["two"]["near"] == content["results"]["two"]["near"]


def test_what_changed_is_done_again(shards, tmp_path, monkeypatch):
    """Weights, what the model is fed with, heads, images behind a path: each is another number."""
    run, data = tmp_path / "run", tmp_path / "data"
    data.mkdir()
    patterns = {name: Path(expand(shards[name])[0]) for name in ("train", "val")}
    copies = {name: data / f"{name}.tar" for name in patterns}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(SUITE))
    calls = []

    def called(argv):
        out = Path(yaml.safe_load(Path(argv[1]).read_text())["out"])
        out.write_text(json.dumps({"values": {"k1_top1": 0.5}, "protocol": "p"}))
        calls.append(out)

    monkeypatch.setattr(probe_knn, "main", called)

    def again() -> int:
        before = len(calls)
        evaluate.main(
            [
                *(str(run), "--suite", str(tmp_path / "suite.yaml"), "--only", "[near]"),
                *("--out", str(tmp_path / "out"), "--data.train", str(copies["train"])),
                *("--data.val", str(copies["val"])),
            ]
        )
        return len(calls) - before

    for name, path in patterns.items():
        copies[name].write_bytes(path.read_bytes())
    export_backbone(vit(0), run, net="student", step=7, data=SHEET)
    assert again() == 1
    assert again() == 0
    export_backbone(vit(1), run, net="student", step=7, data=SHEET)
    assert again() == 1
    export_backbone(vit(1), run, net="student", step=7, data=SHEET | {"mean": [0.1, 0.1, 0.1]})
    assert again() == 1
    export_backbone(vit(1, heads=4), run, net="student", step=7, data=SHEET)
    assert again() == 1
    copies["val"].write_bytes(patterns["train"].read_bytes())
    assert again() == 1
    assert again() == 0


def test_what_fails_leaves_a_note_and_a_gap(models, shards, tmp_path, monkeypatch):
    def broken(argv):
        raise UserError("k-NN: no luck")

    real = probe_knn.main

    def sometimes(argv):
        config = yaml.safe_load(Path(argv[1]).read_text())
        (broken if config["ks"] == [5000] else real)(argv)

    monkeypatch.setattr(probe_knn, "main", sometimes)
    evaluate.main([str(models / "one"), *arguments(models, shards, tmp_path)])
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert "one: many is left out: k-NN: no luck" in content["notes"]
    assert list(content["results"]["one"]) == ["near"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--suite", "nowhere"], "no suite 'nowhere'; there are .*knn_linear"),
        (["--only", "[nearest]"], "no entry 'nearest'; the suite has near, many, videos"),
        (["--data.cue", "x"], "data.cue is given; the suite's entries need train, val, videos"),
        (["--watch", "true"], "is no run directory with a config.yaml"),
        (["--shared", "{trainr: {devices: 2}}"], "shared has 'trainr', which is an option of no"),
    ],
)
def test_mistakes(models, shards, tmp_path, more, told):
    with pytest.raises(UserError, match=told):
        evaluate.main([str(models / "one"), *arguments(models, shards, tmp_path, *more)])


def test_without_any_data_nothing_can_be_done(models, tmp_path):
    given = ["--suite", str(models / "suite.yaml"), "--out", str(tmp_path)]
    with pytest.raises(UserError, match="nothing can be done: near is left out: give --data"):
        evaluate.main([str(models / "one"), *given])


@pytest.mark.parametrize("name", evaluation_suite.names())
def test_suites_that_come_along_are_read(name):
    for entry in load_suite(name):
        assert entry.columns
        config = entry.config(dict.fromkeys(entry.needs.values(), "x"), "run", {"data": {"w": 1}})
        for option in entry.needs:
            inner = config
            for word in option.split("."):
                inner = inner[word]
            assert inner == "x"


@pytest.mark.parametrize("content", ["[]", "entries: {}", "entries: {a: {verb: x}}", "a: [", "3"])
def test_a_suite_that_is_none(tmp_path, content):
    path = tmp_path / "suite.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"suite.yaml"):
        load_suite(str(path))


def test_the_table_of_an_evaluation_by_hand():
    entries = [
        evaluation_suite.Entry("a", "probe a", {}, {}, {"A": "top1", "rank": "rank"}),
        evaluation_suite.Entry("b", "probe b", {}, {}, {"B": "x_rate"}),
        evaluation_suite.Entry("c", "probe c", {}, {}, {"C": "top1"}),
    ]
    table = Evaluation(entries, notes=["c is left out"])
    table.results["m"] = {"a": {"values": {"top1": 0.5, "rank": 12.25}, "protocol": "p"}}
    table.results["n"] = {"b": {"values": {"x_rate": 0.125}, "protocol": "q"}}
    assert table.csv() == "model,A,rank,B\nm,0.5,12.25,\nn,,,0.125\n"
    assert table.markdown() == (
        "| model | A, % | rank | B, % |\n|---|---|---|---|\n| m | 50.0 | 12.25 | - |\n"
        "| n | - | - | 12.5 |\n\nProtocols:\n\n- a (m): p\n- b (n): q\n\nNotes:\n\n"
        "- c is left out\n"
    )


def checkpoint(run: Path, seed: int, step: int) -> None:
    backbone = vit(seed).state_dict()
    state = {f"backbone.{k}": v for k, v in backbone.items()} | {"objectives.x": torch.ones(1)}
    content = {"state_dict": state, "global_step": step, "epoch": 0}
    write(content, run / "checkpoints" / f"step-{step:08d}.ckpt")


def test_watching_a_run_meets_every_checkpoint_once(tmp_path):
    """A checkpoint that is there from the start, one that comes while others are read, the last."""
    run, out = tmp_path / "run", tmp_path / "out"
    (run / "checkpoints").mkdir(parents=True)
    model = {"class_path": "contramask.models.vit.VisionTransformer", "init_args": vit(0).config}
    config = {
        "model": {"backbone": model},
        "data": {"images": SHEET | {"classes": None}},
        "export": {"net": "student"},
        "trainer": {"max_steps": 30},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    checkpoint(run, 1, 10)
    waits = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:  # the end, by the export alone
            export_backbone(vit(3), run, net="student", step=30, data=SHEET)

    seen = []
    for source in Watch([Source("r", run)], out, poll=5.0, patience=60.0, sleep=sleep):
        backbone, sheet = load_backbone(source.path)
        seen.append((source.name, sheet["step"]))
        expected = vit(sheet["step"] // 10).state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in backbone.state_dict().items())
        assert sheet["data"]["mean"] == SHEET["mean"]
        if sheet["step"] == 10:
            checkpoint(run, 2, 20)
            (run / "checkpoints" / "step-00000010.ckpt").unlink()
    assert seen == [("r-00000010", 10), ("r-00000020", 20), ("r-00000030", 30)]
    assert waits == [5.0, 5.0]


def test_watching_ends_without_news(tmp_path, caplog):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    config = "{trainer: {max_steps: 3}, model: {}, data: {}, export: {}}"
    (run / "config.yaml").write_text(config)
    waits: list[float] = []
    found = Watch([Source("r", run)], tmp_path, poll=7.0, patience=20.0, sleep=waits.append)
    assert list(found) == []
    assert waits == [7.0, 7.0]
    assert "no new checkpoint" in caplog.text
