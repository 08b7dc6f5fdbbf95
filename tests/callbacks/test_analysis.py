"""Analyses during training: what they say, where it goes, and that training does not notice."""

import json

import pytest
import pytorch_lightning as pl
import torch

from contramask.analysis.cka import compare
from contramask.analysis.grams import Grams
from contramask.analysis.over_time import _coordinate
from contramask.analysis.reading import Reading
from contramask.analysis.run import analyse
from contramask.analysis.suite import Settings
from contramask.callbacks.analysis import AnalysisCallback
from contramask.checkpoints.export import export_backbone
from contramask.tracking.jsonl import JSONLLogger, read_metrics
from contramask.types import UserError
from tests.builders import SIZE, StopAt, ToyStream, pretraining, randn, tiny_vit

SETTINGS = Settings(replicates=0, cka=("flat/raw",), sublayers=("block",), minibatch=5)
# Update 0 is the start; then every second update, and the last.
LOOKS = [0, 2, 3]


class Data(pl.LightningDataModule):
    """The toy stream, and 17 clean images."""

    def __init__(self, val: bool = True, images: int = 17):
        super().__init__()
        self.val, self.images, self.stream = val, images, ToyStream()

    def train_dataloader(self):
        self.stream.trainer = self.trainer
        return self.stream

    def clean_dataloader(self, split, limit=None, batch=11):
        if split == "val" and not self.val:
            raise UserError("data.val names no shards")
        images = randn(min(limit or self.images, self.images), 3, *SIZE, seed=7)
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            yield {
                "views": {"clean": part[None]},
                "label": torch.arange(len(part)) % 3,
                "position": start,
                "keys": [f"{split} {start + i}" for i in range(len(part))],
            }

    def to_device(self, batch, device):
        return batch


def watcher(folder, **options) -> AnalysisCallback:
    options = {"every": 2, "images": 17, "settings": SETTINGS, "figures": False} | options
    return AnalysisCallback(folder, **options)


def train(*callbacks, steps=3, data=None, ckpt=None, logger=False, module=None, stop=None):
    module = module or pretraining("hybrid")
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=[*callbacks, *([StopAt(stop)] if stop else [])],
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(module, datamodule=data or Data(), ckpt_path=ckpt)
    return module, trainer


def readings(folder, step: int) -> dict:
    content = json.loads((folder / f"step-{step:08d}.json").read_text())
    return {r["name"]: r for r in content["readings"]}


def test_training_is_bitwise_the_same_with_and_without(tmp_path):
    plain, _ = train()
    everything = ("cka", "attention", "fourier", "geometry", "spectra", "invariance", "classes")
    watched, _ = train(watcher(tmp_path, analyses=everything))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    assert [m.training for m in plain.modules()] == [m.training for m in watched.modules()]


def test_numbers_reach_the_loggers_at_their_steps(tmp_path):
    watch = watcher(tmp_path / "analysis", figures=True)
    _, trainer = train(watch, logger=JSONLLogger(tmp_path))
    rows = {row["step"]: row for row in read_metrics(tmp_path) if "repr/rankme" in row}
    assert list(rows) == LOOKS
    promised = [
        "attn/distance/block_01", "attn/nmi/block_00", "fourier/high/embedding",
        "repr/effective_rank/cls/block_00", "repr/variance_top10/final", "analysis/seconds",
        "analysis/share",
    ]  # fmt: skip
    for step, row in rows.items():
        assert set(promised) <= row.keys()
        assert ("cka/initial/block_01" in row) == (step > 0)
        assert not any("by_head" in key or "/map" in key for key in row)
        found = readings(tmp_path / "analysis", step)
        assert found["attn/distance_by_head"]["axes"]["head"] == ["0", "1", "2"]
        distance = found["attn/distance"]["value"]
        assert row["attn/distance/block_01"] == pytest.approx(distance[1], rel=1e-6)
    assert trainer.callback_metrics["repr/rankme"] == pytest.approx(rows[3]["repr/rankme"])
    figures = sorted(p.name for p in (tmp_path / "analysis").glob("*.png"))
    assert "depth-step-00000002.png" in figures
    assert "cka-step-00000003.png" in figures


def test_it_says_what_the_command_says_of_the_same_weights(tmp_path):
    module, _ = train(watcher(tmp_path))
    offline = watcher(tmp_path).analyses
    found = analyse(module.backbone, Data().clean_dataloader("val", batch=17), offline)
    live = readings(tmp_path, 3)
    for name in ("attn/distance", "fourier/high", "repr/effective_rank"):
        value = torch.tensor(live[name]["value"], dtype=torch.float64)
        torch.testing.assert_close(value, found.readings[name].value, rtol=0, atol=0)


def test_cka_to_the_start_the_last_time_and_anchors(tmp_path):
    anchors = {}
    for i, (name, depth) in enumerate((("contrastive", 2), ("masked", 3))):
        vit = tiny_vit(seed=20 + i, timm={"depth": depth})
        sheet = {"mean": [0.0] * 3, "std": [1.0] * 3, "size": 16}
        export_backbone(vit, tmp_path / name, net="student", step=0, data=sheet)
        anchors[name] = str(tmp_path / name)
    states = {}

    class Keep(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            states[0] = pl_module.backbone.state_dict() | {}
            states[0] = {k: v.clone() for k, v in states[0].items()}

        def on_train_batch_end(self, trainer, pl_module, *args):
            now = pl_module.backbone.state_dict().items()
            states[trainer.global_step] = {k: v.clone() for k, v in now}

    train(Keep(), watcher(tmp_path, anchors=anchors))

    def stack(state, depth=2):
        vit = tiny_vit(timm={"depth": depth})
        vit.load_state_dict(state)
        grams = Grams(sublayers=("block",), batch=5)
        analyse(vit, Data().clean_dataloader("val", batch=17), {"": grams})
        return grams.stack()

    now, found = stack(states[3]), readings(tmp_path, 3)
    for name, step in (("initial", 0), ("previous", 2)):
        expected = compare(now, stack(states[step]))[0].value
        value = torch.tensor(found[f"cka/{name}/map"]["value"], dtype=torch.float64)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
        assert found[f"cka/{name}"]["value"] == expected.diagonal().tolist()
    same = torch.tensor(found["cka/contrastive"]["value"], dtype=torch.float64)
    best = torch.tensor(found["cka/masked/map"]["value"], dtype=torch.float64).amax(1)
    assert found["cka/masked"]["value"] == best.tolist()  # it has another depth
    coordinate = torch.tensor(found["cka/coordinate"]["value"], dtype=torch.float64)
    torch.testing.assert_close(coordinate, (same - best) / (same + best))


def test_the_coordinate_is_bounded():
    def line(*values):
        axes = {"layer": tuple(f"block_{i:02d}" for i in range(len(values)))}
        return Reading("cka/x", axes, torch.tensor(values, dtype=torch.float64))

    found = _coordinate(line(-0.01, 0.05, 0.9, -0.1), line(0.005, -0.04, 0.3, -0.2), ["a", "b"])
    assert found.missing.tolist() == [True, False, False, True]
    assert found.value.tolist() == pytest.approx([0, 1, 0.5, 0])


def test_an_anchor_that_cannot_see_the_images_is_left_out(tmp_path, caplog):
    odd = tiny_vit(patch_size=5, img_size=20)
    sheet = {"mean": [0.0] * 3, "std": [1.0] * 3, "size": 20}
    export_backbone(odd, tmp_path / "odd", net="student", step=0, data=sheet)
    train(watcher(tmp_path, anchors={"odd": str(tmp_path / "odd")}))
    assert "without anchor odd" in caplog.text
    assert "patches of 5" in caplog.text
    assert "cka/initial" in readings(tmp_path, 3)


def test_resumed_it_goes_on_comparing_with_its_own_start(tmp_path):
    train(watcher(tmp_path / "straight"), steps=6)
    first = watcher(tmp_path / "one")
    _, trainer = train(first, steps=6, stop=3)
    trainer.save_checkpoint(tmp_path / "3.ckpt")
    train(watcher(tmp_path / "two"), steps=6, ckpt=tmp_path / "3.ckpt")
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == [
        "step-00000004.json", "step-00000006.json"
    ]  # fmt: skip
    for step in (4, 6):
        one, two = (tmp_path / f / f"step-{step:08d}.json" for f in ("straight", "two"))
        assert one.read_text() == two.read_text()


def test_without_validation_the_training_set_is_looked_at(tmp_path):
    train(watcher(tmp_path), data=Data(val=False))
    assert (tmp_path / "step-00000003.json").is_file()


def test_what_cannot_be_is_told_once_and_training_goes_on(tmp_path, caplog):
    _, trainer = train(watcher(tmp_path / "few"), data=Data(images=3))
    assert len([r for r in caplog.records if "minibatch of 5" in r.message]) == 1
    assert "attn/distance" in readings(tmp_path / "few", 3)  # the rest is told
    assert "cka/initial" not in readings(tmp_path / "few", 3)
    _, trainer = train(watcher(tmp_path), data=Data(images=0))
    assert "analyses are off: there are no images" in caplog.text
    assert trainer.global_step == 3
    (tmp_path / "full").touch()
    _, trainer = train(watcher(tmp_path / "full"))
    assert "no analysis in" in caplog.text
    assert trainer.global_step == 3


def test_mistakes_are_told_before_the_first_step(tmp_path):
    with pytest.raises(UserError, match="net is 'teacher'"):
        train(watcher(tmp_path, net="teacher"), module=pretraining("mae"))
    with pytest.raises(UserError, match=r"anchor masked: there is no .*nowhere"):
        train(watcher(tmp_path, anchors={"masked": str(tmp_path / "nowhere")}))
    with pytest.raises(UserError, match=r"no analysis 'attn'.*attention"):
        watcher(tmp_path, analyses=("attn",))
    with pytest.raises(UserError, match="every is -1"):
        watcher(tmp_path, every=-1)


def test_a_broken_layer_is_named_and_no_number_is_nan(tmp_path, caplog):
    vit = tiny_vit()
    with torch.no_grad():
        vit.vit.blocks[1].mlp.fc2.bias[3] = torch.nan
    everything = ("cka", "attention", "fourier", "geometry", "spectra", "invariance", "classes")
    analyses = watcher(tmp_path, analyses=everything).analyses
    found = analyse(vit, Data().clean_dataloader("val"), analyses)
    assert set(found.broken) == {"block_01", "final"}
    assert "block_01 are not finite" in caplog.text
    for reading in found.readings.values():
        assert reading.value.isfinite().all()
        if "layer" in reading.axes and "block_01" in reading.axes["layer"]:
            at = reading.axes["layer"].index("block_01")
            gone = reading.missing.movedim(list(reading.axes).index("layer"), 0)
            # The attention of the block is before its broken MLP.
            assert gone[at].all() == (not reading.name.startswith("attn/")), reading.name
            assert not gone[0].all() or reading.name.endswith("depths")
