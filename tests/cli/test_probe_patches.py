"""`contramask probe patches` on real road scenes and on scenes in which colour is class."""

import json
import os
import socket
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from contramask.checkpoints.export import export_backbone
from contramask.cli import probe_patches
from contramask.cli.probe import main
from contramask.models.vit import VisionTransformer
from contramask.types import UserError
from tests.data.tars import write_tar
from tests.data.test_dense import VOID, encoded, members, patterns, shard

__all__ = ["patterns"]

QUICK = ["--data.workers", "0", "--trainer.accelerator", "cpu"]
QUICK += ["--trainer.enable_progress_bar", "false"]
FEW = ["--recipe.rates", "[0.3]", "--recipe.epochs", "3", *QUICK]


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> str:
    """A ViT of three blocks that sees 32 pixels in 4 x 4 patches."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "depth": 3, "num_heads": 3}
    backbone = VisionTransformer(img_size=32, patch_size=8, timm=sizes)
    folder = tmp_path_factory.mktemp("net")
    sheet = {"size": 32, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    export_backbone(backbone, folder, net="student", step=7, data=sheet)
    return str(folder)


def data_options(patterns) -> list[str]:
    return ["--data.train", patterns["train"], "--data.val", patterns["val"]]


def run(net, out, *options: str) -> dict:
    main(["patches", net, *options, "--out", str(out)])
    return json.loads(out.read_text())


def test_real_road_scenes_layer_by_layer(net, shared_data, tmp_path, capsys):
    folder = shared_data("camvid")
    data = data_options({s: f"{folder}/{s}-*.tar" for s in ("train", "val")})
    found = run(
        net, tmp_path / "found.json", *data, "--classes", "11", "--ignore", "11", "--tile", "120",
        "--sources", "all", "--together", "2", "--train_images", "4", "--val_images", "3",
        "--metrics", "[dot, l2]", "--cleanings", "[raw, top5]", "--ks", "[1, 5]",
        "--linear", "[raw, zscore]", "--pictures", "2", *FEW,
    )  # fmt: skip
    rows = found["table"]
    assert [row["source"] for row in rows[::10]] == ["block_00", "block_01", "block_02"]
    assert len(rows) == 3 * (2 * 2 * 2 + 2)
    assert (
        rows[0].items() >= {"metric": "dot", "cleaning": "raw", "k": 1, "votes": "uniform"}.items()
    )
    values = found["values"]
    assert (values["knn_miou"], values["linear_miou"]) == (rows[0]["miou"], rows[8]["miou"])
    assert (values["train_images"], values["images"], values["skipped"]) == (4, 3, 0)
    assert 3 * 192 < values["train_patches"] <= 4 * 192
    # Sky, buildings and roads differ in colour: far above one class for all pixels.
    assert 0.1 < max(row["miou"] for row in rows) < 0.6
    assert all(row["pixel_top1"] > 0.25 for row in rows if row["probe"] == "linear")
    assert all(len(row["iou"]) == 11 for row in rows)
    assert found["step"] == 7
    for fact in ("4 train images", "tiles of 120 pixels", "resized to 32", "label 11 ignored"):
        assert fact in found["protocol"]
    assert len(list((tmp_path / "patches").glob("*.png"))) == 2
    assert not list(tmp_path.glob(".*parts*"))
    told = capsys.readouterr().out
    assert "block_02" in told
    assert "top5" in told


def test_a_stopped_run_goes_on_with_the_sources_that_are_left(net, patterns, tmp_path, monkeypatch):
    options = [*data_options(patterns), "--classes", "4", "--ignore", str(VOID), *FEW]
    options += ["--sources", "[last, block_00]", "--together", "1"]
    whole = run(net, tmp_path / "whole.json", *options)
    read, limit = [], 1

    class Stopping(probe_patches.PatchEvaluation):
        def on_validation_epoch_end(self):
            if len(read) == limit:
                raise KeyboardInterrupt
            read.append(self.sources)
            super().on_validation_epoch_end()

    monkeypatch.setattr(probe_patches, "PatchEvaluation", Stopping)
    out = tmp_path / "stopped.json"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(net, out, *options)
    assert not out.exists()
    limit = 9
    assert run(net, out, *options) == whole
    assert read == [("last",), ("block_00",)]


def test_parts_of_other_settings_are_not_reused(net, patterns, tmp_path, monkeypatch):
    """What is kept is made a result that nothing measures: it is shown, or measured anew."""
    options = [*data_options(patterns), "--classes", "4", "--ignore", str(VOID), *FEW]
    options += ["--linear", "[]", "--metrics", "[l2]", "--cleanings", "[raw]"]
    out, kept = tmp_path / "found.json", tmp_path / ".found.parts.jsonl"
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # as after a stop at the very end
    run(net, out, *options)
    marked = kept.read_text().replace('"images": 5', '"images": 77')

    def images(*changes: str) -> int:
        kept.write_text(marked)
        return run(net, out, *options, *changes)["values"]["images"]

    assert images() == images("--together", "1") == images("--pictures", "1") == 77
    assert images("--trainer.precision", "bf16-mixed") == 5
    assert images("--trainer.limit_val_batches", "2") == 4
    assert images("--norm", "none") == images("--recipe.epochs", "4") == 5
    with monkeypatch.context() as patch:
        patch.setattr(probe_patches, "FORMAT", "patches of tomorrow")
        assert images() == 5
    (tmp_path / "classes.json").write_text('["road", "tree", "sky", "car"]')
    assert images() == 5
    (tmp_path / "classes.json").rename(tmp_path / "gone.json")
    assert images() == 77
    shard(tmp_path / "val-000000.tar", range(30, 35))
    assert images() == 5


def on_a_rank(index: int, port: int, net: str, folder: str, options: list[str]) -> None:
    place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {k: str(v) for k, v in place.items()}
    # As torchrun would: Lightning then starts no processes of its own.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    main(["patches", net, *options, *two, "--out", f"{folder}/{index}/found.json"])
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_first_rank_knows_what_is_done(net, patterns, tmp_path, monkeypatch):
    """Each rank on a disk of its own: the first has one of two sources, the second nothing."""
    options = [*data_options(patterns), "--classes", "4", "--ignore", str(VOID), *FEW]
    options += ["--sources", "[last, block_00]", "--together", "1"]
    whole = run(net, tmp_path / "0" / "found.json", *options)
    finish = probe_patches.finish
    monkeypatch.setattr(probe_patches, "finish", lambda *_: pytest.fail("stopped"))
    with pytest.raises(pytest.fail.Exception):
        run(net, tmp_path / "0" / "found.json", *options)
    monkeypatch.setattr(probe_patches, "finish", finish)
    kept = tmp_path / "0" / ".found.parts.jsonl"
    settings, first, _ = kept.read_text().splitlines(keepends=True)
    kept.write_text(settings + first)
    (tmp_path / "0" / "found.json").unlink()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    arguments = (port, net, str(tmp_path), options)
    mp.start_processes(on_a_rank, arguments, nprocs=2, start_method="fork")
    assert json.loads((tmp_path / "0" / "found.json").read_text()) == whole
    assert not kept.exists()
    assert not (tmp_path / "1").exists()  # the second rank writes nothing


def test_faults_and_missing_classes_are_told(net, patterns, tmp_path):
    shard(tmp_path / "val-000000.tar", range(20, 25), seg_png=encoded(np.zeros((4, 5), np.uint8)))
    options = [*data_options(patterns), "--classes", "6", "--ignore", str(VOID), *FEW]
    found = run(net, tmp_path / "found.json", *options, "--cleanings", "[raw]")
    assert found["skipped"] == {"train": 0, "val": 1}
    assert found["values"]["skipped"] == 1
    assert found["absent"] == {"train": ["4", "5"], "val": ["4", "5"]}
    assert "1 bad val images skipped; no labelled patch of 4, 5 in train" in found["protocol"]


def test_names_beside_the_shards_say_how_many_classes_there_are(net, patterns, tmp_path):
    (tmp_path / "classes.json").write_text('["road", "tree", "sky", "car"]')
    options = [*data_options(patterns), "--ignore", str(VOID), *FEW, "--linear", "[]"]
    found = run(net, tmp_path / "found.json", *options)
    assert found["classes"] == ["road", "tree", "sky", "car"]
    assert {row["probe"] for row in found["table"]} == {"knn"}
    with pytest.raises(UserError, match=r"classes is 5, .* names 4"):
        run(net, tmp_path / "found.json", *options, "--classes", "5")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--classes", "3"], r"^s000 of .*000000.tar: .* the label 3; labels are 0 to 2, and 9"),
        ([], "nothing says how many classes"),
        (["--classes", "4", "--tile", "3"], "tile is 3 pixels and has 4 patches a side"),
        (["--classes", "4", "--images.size", "36"], "no whole number of patches of 8"),
        (["--classes", "4", "--sources", "[block_03]"], "the backbone has 3 blocks"),
        (["--classes", "4", "--sources", "[last, last]"], "name one or more, each once"),
        (["--classes", "4", "--train_images", "12"], "data.train has 11 images"),
        (["--classes", "4", "--together", "0"], "together is 0; it is 1 or more"),
        (["--classes", "4", "--ks", "[999]"], "k is 999; the bank has"),
        (["--classes", "4", "--cleanings", "[top24]"], "width 24 allow 1..23"),
        (["--classes", "4", "--metrics", "[manhattan]"], "metrics"),
        (["--classes", "4", "--size", "[0, 3]"], r"size is \(0, 3\)"),
    ],
)
def test_mistakes(net, patterns, tmp_path, options, told):
    shared = [*data_options(patterns), "--ignore", str(VOID), *FEW]
    with pytest.raises(UserError, match=told):
        run(net, tmp_path / "found.json", *shared, *options)


def test_colour_masks_are_refused(net, patterns, tmp_path):
    parts = [
        (f"a.{suffix}", data) for suffix, data in members(0, seg_png=members(0)["png"]).items()
    ]
    write_tar(tmp_path / "rgb.tar", parts)
    options = data_options(patterns | {"train": str(tmp_path / "rgb.tar")})
    with pytest.raises(UserError, match=r"^a of .*rgb.tar: .* 8 bits, RGB"):
        run(net, tmp_path / "found.json", *options, "--classes", "4", *FEW)
