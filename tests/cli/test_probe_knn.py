"""`contramask probe knn` on shards of the embedded images."""

import json
import logging
from pathlib import Path

import pytest
import torch

from contramask.checkpoints.export import export_backbone
from contramask.cli import probe_knn
from contramask.cli.probe import main
from contramask.data.examples import Images
from contramask.data.module import ImageShards
from contramask.models.vit import VisionTransformer
from contramask.probes.extraction import extract
from contramask.probes.features import Feature
from contramask.probes.knn import KNN
from contramask.probes.knn_plan import TablePlan, standard_cleanings
from contramask.training import knn_search
from contramask.types import UserError

pytestmark = [
    pytest.mark.filterwarnings(
        r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning",
        r"ignore:.*does not have many workers",
        # its processes are forked, which is the quickest way to have two
        "ignore:This process .* is multi-threaded:DeprecationWarning",
    )
]
QUIET = [
    "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
    "--data.workers", "0", "--data.batch_size", "48",
]  # fmt: skip
WIDTH = 24


@pytest.fixture(autouse=True)
def _no_handler_outlives_its_test():
    """It would write to a stream that pytest has closed."""
    yield
    own = logging.getLogger("contramask")
    own.handlers.clear()
    own.propagate = True


@pytest.fixture(scope="module")
def backbone() -> VisionTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        timm = {"embed_dim": WIDTH, "depth": 2, "num_heads": 3}
        return VisionTransformer(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, timm=timm
        ).eval()


@pytest.fixture
def run(tmp_path, backbone) -> Path:
    data = {"mean": [0.5] * 3, "std": [0.25] * 3, "size": 32, "resize": 32}
    export_backbone(backbone, tmp_path / "model", net="student", step=7, data=data)
    return tmp_path / "model"


def probe(run: Path, data: list[str], *options: str, name: str | None = None) -> dict:
    """The result; `name`: of the file where none is given."""
    out = run / "probes" / f"knn-{name}.json" if name else run / "result.json"
    given = [] if name else ["--out", str(out)]
    main(["knn", str(run), *data, "--pool", "mean", *QUIET, *given, *options])
    return json.loads(out.read_text())


def test_a_model_from_command_to_file(run, data, backbone, capsys):
    result = probe(run, data, name="last-mean-final")
    fed = Images(size=32, resize=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    images = ImageShards(data[1], val=data[3], workers=0, batch_size=48, images=fed)
    banks = [
        extract(
            backbone,
            (images.to_device(b, "cpu") for b in images.clean_dataloader(split)),
            feature=Feature(pool="mean"),
        )
        for split in ("train", "val")
    ]
    own = KNN(1 + int(torch.cat([y for _, y in banks]).max()), ks=(1, 10, 20, 100, 200))
    own.fit(*banks[0])
    assert (result["probe"], result["step"], result["net"]) == ("knn", 7, "student")
    values = result["values"]
    for k, votes in own.votes(banks[1][0]).items():
        right = (votes.argmax(1) == banks[1][1]).double().mean().item()
        assert values[f"k{k}_top1"] == pytest.approx(right, abs=1e-6)
    assert values["images"] == 64
    assert "k1_top5" not in values
    assert values["k10_top5"] >= values["k10_top1"]
    for fact in (
        "cosine (votes weighted by exp(cosine/0.07)), k = 1,10,20,100,200, bank of 256 train",
        "mean of patches of the last block after the final norm, resize 32, centre crop 32",
        "64 val images", "MiB a rank beside features",
    ):  # fmt: skip
        assert fact in result["protocol"]
    assert result["finding"] is None
    assert not list((run / "probes").glob("*.parts"))
    assert "k20_top1" in capsys.readouterr().out


def test_the_whole_table_is_one_command_and_reads_features_once(run, data, capsys):
    result = probe(run, data, "--table", "true", name="last-mean-final-table")
    rows = result["table"]
    words = ["raw", "zscore", "pca", "top1", "top5", "top10", "top20"]  # 50 channels there are not
    assert [r["cleaning"] for r in rows[:: 3 * 5]] == words
    assert len({(r["metric"], r["cleaning"], r["k"]) for r in rows}) == 3 * 7 * 5
    assert list(result["widths"].values()) == [24, 24, 23, 23, 19, 14, 4]
    shares = result["variance_share"]
    assert list(shares) == ["1", "5", "10", "20"]
    assert 0 < shares["1"] < shares["5"] < shares["10"] < shares["20"] < 1
    assert result["finding"].startswith("1-NN by inner product is ")
    assert "cosine 20-NN is" in result["finding"]
    shown = capsys.readouterr().out
    for text in ("dot: top-1 in per cent", "k = 200", f"{100 * shares['20']:.1f} %"):
        assert text in shown
    assert result["finding"] in shown
    # The features are there now: what a backbone would say of images is not asked again.
    few = ["--metrics", "[l2,dot]", "--cleanings", "[top3,zscore]", "--ks", "[7]"]
    again = probe(run, data, *few)
    assert [(r["metric"], r["cleaning"]) for r in again["table"]] == [
        ("l2", "top3"), ("dot", "top3"), ("l2", "zscore"), ("dot", "zscore"),
    ]  # fmt: skip
    assert "3" in again["variance_share"]
    assert len(list((run / "probes" / "features").glob("*/pass-*"))) == 2


def test_two_ranks_and_no_cache_write_the_same(run, data):
    options = ["--metrics", "[cosine,l2]", "--cleanings", "[raw,top5]", "--ks", "[1,20,256,257]"]
    options += ["--cache", "none"]
    one = probe(run, data, *options)
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp_fork"]
    assert probe(run, data, *options, *two)["table"] == one["table"]
    assert one["notes"] == ["k = 257: more than the bank of 256 rows allows, 4 numbers skipped"]
    assert not list((run / "probes").glob("features*"))


def test_a_stopped_table_goes_on_in_the_next_command(run, data, monkeypatch):
    options = ["--cleanings", "[raw,zscore,top2]", "--ks", "[5]"]
    scores, made = knn_search.Scores, []

    def stopping(plan, cleaning, *rest, **more):
        made.append(str(cleaning))
        if made == ["raw", "zscore"]:
            raise KeyboardInterrupt
        return scores(plan, cleaning, *rest, **more)

    monkeypatch.setattr(knn_search, "Scores", stopping)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        probe(run, data, *options)
    assert len(list(run.glob("*.parts"))) == 1
    result = probe(run, data, *options)
    assert made == ["raw", "zscore", "zscore", "top2"]
    assert [r["cleaning"] for r in result["table"]] == ["raw", "zscore", "top2"]
    assert not list(run.glob("*.parts"))


def test_parts_of_other_images_are_not_gone_on_with(run, data, monkeypatch):
    """Only the normalisation is another, which no word of the clean view's sizes tells."""
    options, made = ["--cleanings", "[raw,zscore]", "--ks", "[5]"], []
    scores = knn_search.Scores

    def stopping(plan, cleaning, *rest, **more):
        made.append(str(cleaning))
        if len(made) == 2:
            raise KeyboardInterrupt
        return scores(plan, cleaning, *rest, **more)

    monkeypatch.setattr(knn_search, "Scores", stopping)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        probe(run, data, *options)
    probe(run, data, *options, "--images.std", "[0.9,0.9,0.9]")
    assert made == ["raw", "zscore", "raw", "zscore"]


def test_another_plan_is_another_file():
    plain = {"limit": None, "images": None, "precision": "32-true"}
    alone, width = Feature(), WIDTH
    plans = [
        TablePlan(), TablePlan(cleanings=("zscore",)), TablePlan(metrics=("l2",)),
        TablePlan(ks=(5,)), TablePlan(temperature=0.1), TablePlan(cleanings=("raw", "pca")),
        TablePlan(metrics=("cosine", "dot", "l2"), cleanings=standard_cleanings(width)),
        TablePlan(leave_one_out=True),
    ]  # fmt: skip
    names = [probe_knn.name_of(plan, alone, width, plain) for plan in plans]
    names.append(probe_knn.name_of(TablePlan(), alone, width, plain | {"limit": 9}))
    assert len(set(names)) == len(names)
    stem = "knn-last-cls-final"
    assert (names[0], names[6], names[7]) == (stem, f"{stem}-table", f"{stem}-leave-one-out")


def test_train_alone_leaves_each_image_out(run, data):
    options = ["--leave_one_out", "true", "--ks", "[1,20,255,256]"]
    both = probe(run, data, *options)
    alone = probe(run, data[:2], *options)
    assert both["table"] == alone["table"]
    assert not list((run / "probes" / "features").glob("val-*"))
    assert alone["values"]["images"] == 256
    assert [r["k"] for r in alone["table"]] == [1, 20, 255]
    assert alone["notes"] == ["k = 256: more than the bank of 256 rows allows, 1 numbers skipped"]
    assert "256 train images as queries" in alone["protocol"]
    # Everyone but the image itself votes: each class has lost one vote where it is right.
    assert alone["values"]["k255_top1"] < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ks", "[300]"], "k is 300; the bank has 256 labelled rows and k lies in 1..256"),
        (["--ks", "[0]"], "ks is .*allowed are 1 and more"),
        (["--cleanings", "[white]"], "cleaning is 'white'; allowed are raw, zscore, pca"),
        (["--cleanings", "[top24]"], "features of width 24 allow 1..23"),
        (["--metrics", "[manhattan]"], "metrics"),
        (["--metrics", "[dot]", "--weights", "exp"], "set weights to auto or uniform"),
        (["--temperature", "0.001"], "temperature is 0.001; allowed are"),
        (["--trainer.limit_val_batches", "2"], "limit_val_batches"),
    ],
)
def test_mistakes_are_told(run, data, options: list[str], message: str, capsys):
    with pytest.raises((UserError, SystemExit)) as told:
        probe(run, data, *options)
    text = str(told.value) + capsys.readouterr().err
    assert all(part in text for part in message.split(".*"))
