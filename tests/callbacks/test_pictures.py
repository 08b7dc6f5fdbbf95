"""Pictures are drawn when they are due, of what was trained on, and never stop a run."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from contramask.callbacks.pictures import Pictures
from contramask.tracking.wandb import Tracker
from contramask.types import UserError
from tests.callbacks.watched_run import IMAGES, SIZE, Made, Stream, network, train

pytestmark = pytest.mark.filterwarnings(
    "ignore:Found .* in eval mode",
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:.isinstance.treespec, LeafSpec.",
)


@pytest.fixture
def drawn(monkeypatch) -> dict[str, dict[str, torch.Tensor]]:
    """What would be drawn, by file name."""
    found: dict[str, dict[str, torch.Tensor]] = {}

    def keep(rows, path) -> None:
        found[Path(path).name] = dict(rows)

    monkeypatch.setattr("contramask.report.figures.image_grid", keep)
    return found


def test_drawn_at_the_first_the_due_and_the_last_update(tmp_path):
    train(tmp_path, Pictures(every=3), steps=7, accumulate_grad_batches=2)
    names = sorted(p.name for p in (tmp_path / "pictures").iterdir())
    steps = ("00000001", "00000003", "00000006", "00000007")
    assert names == sorted(f"{n}-step-{s}.jpg" for n in ("views", "reconstruct") for s in steps)
    with Image.open(tmp_path / "pictures" / names[0]) as picture:
        assert picture.size[0] > 4 * 90


def test_never_is_never(tmp_path):
    train(tmp_path, Pictures(every=0), steps=2)
    assert not (tmp_path / "pictures").exists()


def test_a_resumed_run_does_not_draw_the_step_it_begins_with(tmp_path):
    train(tmp_path, steps=3).save_checkpoint(tmp_path / "a.ckpt")
    train(tmp_path, Pictures(tmp_path / "new", every=3), steps=4, resume=tmp_path / "a.ckpt")
    assert {p.name[-12:] for p in (tmp_path / "new").iterdir()} == {"00000004.jpg"}


def test_views_are_those_of_the_batch_in_their_own_colours(tmp_path, drawn):
    train(tmp_path, Pictures(every=1, images=3), steps=2)
    batch = next(iter(Stream(1, 0.0)))  # the second micro-batch
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.25, 0.5, 0.75), (0.5, 0.25, 0.125)))
    views = drawn["views-step-00000002.jpg"]
    assert list(views) == ["global 0", "global 1", "mild 0"]
    for i in range(2):
        expected = (batch["views"]["global"][i, :3] * std + mean).clamp(0, 1)
        assert torch.equal(views[f"global {i}"], expected)
    shown = drawn["reconstruct-step-00000002.jpg"]
    assert {k: tuple(v.shape) for k, v in shown.items()} == dict.fromkeys(
        ("image", "masked", "reconstruction"), (3, 3, *SIZE)
    )
    assert all(v.min() >= 0 and v.max() <= 1 for v in shown.values())
    # Where nothing is hidden, the picture is the image.
    same = (shown["masked"] == shown["image"]).all(1).float().mean()
    assert 0.4 < same < 0.7


def test_without_known_normalisation_values_stay(tmp_path, drawn):
    data = Made()
    del data.images
    train(tmp_path, Pictures(every=1, images=IMAGES), steps=1, data=data)
    batch = next(iter(Stream(0, 0.0)))
    expected = batch["views"]["global"][0].clamp(0, 1)
    assert torch.equal(drawn["views-step-00000001.jpg"]["global 0"], expected)


def test_each_part_gets_its_own_mode_back_and_sees_evaluation(tmp_path, drawn, monkeypatch):
    net, seen = network(), []
    real = net.inspect

    def inspect(batch, images):
        seen.append((net.training, torch.is_grad_enabled(), torch.compiler.is_compiling()))
        torch.rand(3)  # a draw that training must not notice
        return real(batch, images)

    monkeypatch.setattr(net, "inspect", inspect)
    before = {}

    class Modes(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *args) -> None:
            now = {n: m.training for n, m in pl_module.named_modules()}
            before.setdefault("modes", now)
            assert now == before["modes"]

        def on_train_batch_end(self, trainer, *args) -> None:
            state = torch.random.get_rng_state()
            assert torch.equal(before.setdefault(trainer.global_step, state), state)

    # Looked at before and after the pictures of each step.
    train(tmp_path, Modes(), Pictures(every=1), Modes(), steps=2, module=net)
    assert seen == [(False, False, False)] * 2
    assert True in before["modes"].values()
    assert False in before["modes"].values()  # the teacher


def test_a_full_disk_is_told_and_training_goes_on(tmp_path, caplog):
    (tmp_path / "pictures").write_text("a file where the folder should be")
    trainer = train(tmp_path, Pictures(every=1), steps=2)
    assert trainer.global_step == 2
    assert "no picture" in caplog.text


def test_wandb_gets_the_files(tmp_path, drawn, monkeypatch):
    sent = []
    tracker = Tracker(tmp_path, project="p", online=False, init={})
    monkeypatch.setattr(tracker, "log_metrics", lambda *args, **given: None)
    monkeypatch.setattr(tracker, "finalize", lambda status: None)
    monkeypatch.setattr(tracker, "log_pictures", lambda paths, step: sent.append((paths, step)))
    train(tmp_path, Pictures(every=5), steps=1, logger=tracker)
    folder = tmp_path / "pictures"
    assert sent == [
        (
            {
                "pictures/views": folder / "views-step-00000001.jpg",
                "pictures/reconstruct": folder / "reconstruct-step-00000001.jpg",
            },
            1,
        )
    ]


def test_the_first_rank_alone_draws(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(pl.Trainer, "is_global_zero", False)
    train(tmp_path, Pictures(every=1), steps=1)
    assert drawn == {}


class Plain(pl.LightningModule):
    pass


def test_mistakes_are_told_before_the_first_step(tmp_path):
    with pytest.raises(UserError, match=r"every is -1 and images is 8; .* pictures\.every"):
        Pictures(every=-1)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    with pytest.raises(UserError, match="Plain has no inspect"):
        Pictures().setup(trainer, Plain(), "fit")
    Pictures(every=0).setup(trainer, Plain(), "fit")
