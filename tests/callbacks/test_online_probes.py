"""Online probes: what they measure, where it goes, and that training does not notice."""

import random
import time

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from contramask import distributed
from contramask.callbacks.online_probes import ONLINE, OnlineProbes
from contramask.probes.extraction import extract
from contramask.probes.features import Feature
from contramask.probes.knn import KNN
from contramask.probes.linear import LinearProbe
from contramask.types import UserError
from tests.callbacks.probed_run import Data, Stream, Training, train
from tests.probes.tiny import CLASSES, D, Loader, TinyData

pytestmark = [
    # pytorch-lightning's own use of torch.utils._pytree
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning"),
    # its processes are forked, which is the quickest way to have two
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode"),
]


def probes(**options) -> OnlineProbes:
    return OnlineProbes(**{"every": 2, "bank": 100, "val": 50} | options)


def streams():
    return random.random(), np.random.random(), torch.rand(()).item()  # noqa: NPY002


def test_training_is_bitwise_the_same_with_and_without():
    plain, *_ = train()
    after = streams()
    watched, trainer, _ = train(probes())
    assert "val/knn20_top1" in trainer.callback_metrics
    assert streams() == after
    state = watched.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    for one, two in zip(plain.parameters(), watched.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
    assert [m.training for m in plain.modules()] == [m.training for m in watched.modules()]
    assert not watched.backbone.embed.training


def test_it_measures_what_the_offline_probes_measure_on_the_same_weights():
    module, trainer, told = train(probes(ks=(1, 20)))
    data = TinyData()
    x, y = extract(module.backbone, data.clean_dataloader("train"))
    v, w = extract(module.backbone, data.clean_dataloader("val"))
    knn, linear = KNN(CLASSES, ks=(1, 20)), LinearProbe(D, CLASSES, recipe=ONLINE)
    knn.fit(x, y)
    linear.fit(x, y)
    scores = {f"knn{k}": votes for k, votes in knn.votes(v).items()} | {"linear": linear.predict(v)}
    for name, found in scores.items():
        right = (found.argmax(1) == w).float().mean().item()
        assert trainer.callback_metrics[f"val/{name}_top1"].item() == pytest.approx(right)
        assert told.rows[-1][1][f"val/{name}_top1"] == pytest.approx(right)
    assert told.rows[-1][1]["val/knn20_top1"] > 2 / CLASSES


def test_online_and_offline_features_are_bitwise_equal(monkeypatch: pytest.MonkeyPatch):
    seen = {}
    monkeypatch.setattr(KNN, "fit", lambda self, x, y: seen.update(knn=x) or self.learn(x, y))
    fit = LinearProbe.fit
    monkeypatch.setattr(
        LinearProbe, "fit", lambda self, x, y: seen.update(linear=x) or fit(self, x, y)
    )
    module, *_ = train(probes(feature=Feature(pool="cls+mean")))
    x, _ = extract(
        module.backbone, TinyData().clean_dataloader("train"), feature=Feature(pool="cls+mean")
    )
    assert torch.equal(seen["knn"], x)
    assert torch.equal(seen["linear"], x)


def test_numbers_reach_the_loggers_once_at_their_step():
    _, _, told = train(probes(every=3), steps=8)
    rows = [(step, sorted(row)) for step, row in told.rows if "val/linear_top1" in row]
    names = ["online/seconds", "val/knn1_top1", "val/knn20_top1", "val/linear_top1"]
    assert rows == [(3, names), (6, names), (8, names)]  # 8: the end of training


def test_accumulated_micro_batches_are_one_step():
    _, _, told = train(probes(every=2), steps=4, accumulate_grad_batches=3)
    assert [step for step, row in told.rows if "val/linear_top1" in row] == [2, 4]


def test_a_resumed_run_does_not_measure_its_first_weights_again(tmp_path):
    _, trainer, _ = train(probes(), steps=2, accumulate_grad_batches=3)
    trainer.save_checkpoint(tmp_path / "2.ckpt")
    resumed = train(probes(), steps=4, accumulate_grad_batches=3, resume=tmp_path / "2.ckpt")
    assert [step for step, row in resumed[2].rows if "val/linear_top1" in row] == [4]


def test_limits_reach_the_data():
    data = Data()
    train(probes(every=6, bank=77, val=33), data=data)
    assert data.asked == [("val", 1), ("train", 77), ("val", 33)]


def test_the_teacher_is_another_network():
    module, trainer, _ = train(probes(net="teacher"), module=Training(teacher=True))
    x, y = extract(module.teacher.module, TinyData().clean_dataloader("train"))
    v, w = extract(module.teacher.module, TinyData().clean_dataloader("val"))
    knn = KNN(CLASSES, ks=(20,))
    knn.fit(x, y)
    right = (knn.predict(v).argmax(1) == w).float().mean()
    torch.testing.assert_close(trainer.callback_metrics["val/knn20_top1"], right)


def test_a_teacher_that_is_not_there_is_named_before_the_first_step():
    with pytest.raises(UserError, match="net is 'teacher', but this run has none"):
        train(probes(net="teacher"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"val": False}, "data.val names no shards"), ({"labels": False}, "no image of train has")],
)
def test_without_val_data_or_labels_one_line_says_so(options, reason, caplog):
    _, trainer, told = train(probes(), data=Data(**options))
    lines = [r.message for r in caplog.records if "online probes" in r.message]
    assert len(lines) == 1
    assert lines[0].startswith(f"online probes are off: {reason}" if reason[0] == "d" else "online")
    assert reason in lines[0]
    assert not [row for _, row in told.rows if "val/linear_top1" in row]
    assert trainer.global_step == 6


def test_a_data_module_without_clean_images_is_told(caplog):
    class Bare(pl.LightningDataModule):
        def train_dataloader(self):
            return Stream()

    train(probes(), data=Bare())
    assert "needed is one with clean_dataloader" in caplog.text


def test_a_k_larger_than_the_bank_is_left_out_with_a_line(caplog):
    _, trainer, _ = train(probes(ks=(1, 200)))
    assert "no k = 200, the bank has 50 labelled images" in caplog.text
    assert "val/knn1_top1" in trainer.callback_metrics
    assert "val/knn200_top1" not in trainer.callback_metrics


def test_every_below_one_is_named():
    with pytest.raises(UserError, match="every is 0; allowed is at least 1"):
        OnlineProbes(every=0)


class Check(pl.Callback):
    """On each rank: the number that all should have."""

    def __init__(self, expected: float):
        self.expected = expected

    def on_train_end(self, trainer, pl_module):
        found = trainer.callback_metrics["val/knn20_top1"].item()
        assert found == pytest.approx(self.expected), (trainer.global_rank, found)
        seconds = distributed.gather(trainer.callback_metrics["online/seconds"][None])
        assert (seconds == seconds[0]).all()


class Still(Training):
    """Weights that stay, so that one rank and two have the same."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.backbone.eval()
        return sum(p.sum() for p in self.parameters() if p.requires_grad)


def test_two_ranks_agree_on_what_one_finds():
    _, trainer, _ = train(probes(), module=Still(), steps=2)
    expected = trainer.callback_metrics["val/knn20_top1"].item()
    train(probes(), Check(expected), module=Still(), steps=2, devices=2, strategy="ddp_fork")


def test_seconds_are_those_it_took():
    class Slow(Data):
        def clean_dataloader(self, split, limit=None):
            time.sleep(0.05)
            return Loader(super().clean_dataloader(split, limit).batches)

    _, trainer, _ = train(probes(every=6), data=Slow())
    assert trainer.callback_metrics["online/seconds"] > 0.1
