"""What people read: in a terminal, in a log, after a resume, after an error."""

import io
import logging
import re
import sys
from unittest.mock import Mock

import pytest
import pytorch_lightning as pl
import torch
from rich.console import Console

from contramask.callbacks.progress import Progress
from contramask.callbacks.standing import Standing
from contramask.callbacks.throughput import Throughput
from tests.callbacks.watched_run import Made, network, train

pytestmark = pytest.mark.filterwarnings(
    "ignore:Found .* in eval mode",
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:.isinstance.treespec, LeafSpec.",
    "ignore:You defined a .validation_step. but have no",
    "ignore:The 'val_dataloader' does not have many workers",
)


def console(**given) -> Console:
    return Console(file=io.StringIO(), width=110, **given)


def text(of: Console) -> str:
    assert isinstance(of.file, io.StringIO)
    return of.file.getvalue()


def screen(of: Console) -> str:
    """What is written to a terminal, without its control codes."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text(of))


class Finder(pl.Callback):
    """Finds something after the third update."""

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        if trainer.global_step == 3:
            pl_module.log("val/knn20_top1", 0.4125, batch_size=1)
            pl_module.log("val/rank", 17.25, batch_size=1)


def test_a_log_gets_a_line_now_and_then(tmp_path):
    out = console()
    train(tmp_path, Throughput(), Finder(), Progress(interval=0.0, console=out), steps=6)
    lines = text(out).splitlines()
    assert [re.search(r"step (\d)/6", line)[1] for line in lines] == list("123456")
    assert "\x1b" not in text(out)
    last = lines[-1]
    assert re.search(r"^\d\d:\d\d:\d\d  step 6/6 \(100.0%\)", last)
    assert re.search(r"[\d.,]+ images/s  0:\d\d:\d\d taken", last)
    assert re.search(r"loss \d+\.\d{4}  contrast \d+\.\d{4}  reconstruct \d+\.\d{4}", last)
    assert last.endswith("knn20_top1 41.2%  rank 17.25")
    assert "knn20" not in lines[1]


def test_a_long_interval_leaves_the_first_and_the_last_line(tmp_path):
    out = console()
    train(tmp_path, Progress(interval=1000.0, console=out), steps=5)
    assert re.findall(r"step (\d)/5", text(out)) == ["1", "5"]


def test_a_terminal_keeps_its_lines_in_place(tmp_path):
    out = console(force_terminal=True)
    train(tmp_path, Throughput(), Finder(), Progress(console=out), steps=6)
    shown = screen(out)
    assert "first step ..." in shown
    end = shown[shown.rindex("step 6/6 (100.0%)") :]
    assert re.search(r"images/s +0:\d\d:\d\d taken", end)
    assert re.search(r"loss \d+\.\d{4} +contrast \d+\.\d{4} +reconstruct", end)
    assert re.search(r"knn20_top1 41.2% +rank 17.25 +at step [34]", end)
    assert text(out).endswith("\x1b[?25h")  # the cursor is back


def test_a_resume_starts_where_the_run_was(tmp_path):
    train(tmp_path, steps=3).save_checkpoint(tmp_path / "a.ckpt")
    out = console()
    train(tmp_path, Progress(interval=0.0, console=out), steps=5, resume=tmp_path / "a.ckpt")
    assert re.findall(r"step (\d)/5 \((\d+)", text(out)) == [("4", "80"), ("5", "100")]
    out = console(force_terminal=True)
    train(tmp_path, Progress(console=out), steps=4, resume=tmp_path / "a.ckpt")
    assert re.search(r"step 3/4 \(75.0%\) +first step", screen(out))


def test_steps_are_updates_and_not_micro_batches(tmp_path):
    out = console()
    train(tmp_path, Progress(interval=0.0, console=out), steps=3, accumulate_grad_batches=2)
    assert re.findall(r"step (\d)/3", text(out)) == ["1", "2", "3"]


def test_other_ranks_say_nothing(tmp_path):
    out = console(force_terminal=True)
    bar = Progress(interval=0.0, console=out)
    bar.setup(Mock(spec=pl.Trainer, is_global_zero=False), Mock(spec=pl.LightningModule), "fit")
    bar.on_train_start(Mock(spec=pl.Trainer), Mock(spec=pl.LightningModule))
    bar.on_train_batch_end(Mock(spec=pl.Trainer), Mock(spec=pl.LightningModule), None, {}, 0)
    assert text(out) == ""


def test_metrics_are_read_at_logged_steps_alone(tmp_path, monkeypatch):
    reads = []
    real = Standing.read
    monkeypatch.setattr(
        Standing, "read", lambda self, metrics: (reads.append(self.step), real(self, metrics))
    )
    bar = Progress(console=console(force_terminal=True))
    train(tmp_path, bar, steps=9, log_every_n_steps=3)
    # Until there is a loss, there is nothing to wait for; the last is that of the end.
    assert reads == [1, 2, 3, 6, 9, 9]


def test_an_error_gives_the_terminal_and_the_handlers_back(tmp_path):
    class Failing(pl.Callback):
        def on_train_batch_end(self, trainer, *args) -> None:
            logging.getLogger("contramask.test").warning("above the bar")
            assert handler.stream is not stream
            raise ArithmeticError("on purpose")

    stream = sys.stderr
    handler = logging.StreamHandler(stream)
    logging.getLogger("contramask.test").addHandler(handler)
    out = console(force_terminal=True)
    try:
        with pytest.raises(ArithmeticError):
            train(tmp_path, Failing(), Progress(console=out))
    finally:
        logging.getLogger("contramask.test").removeHandler(handler)
    assert "above the bar" in screen(out)
    assert handler.stream is stream
    assert sys.stderr is stream
    assert text(out).endswith("\x1b[?25h")


def test_a_validation_tells_why_it_stands_still(tmp_path):
    out, net = console(), network()
    notes = []
    bar = Progress(interval=1000.0, console=out)

    def validation_step(batch, batch_idx) -> None:
        notes.append(bar.standing.note)
        net.log("val/knn20_top1", 0.5, batch_size=1)

    net.validation_step = validation_step
    data = Made()
    data.val_dataloader = lambda: torch.utils.data.DataLoader([1, 2], batch_size=None)
    data.on_after_batch_transfer = lambda batch, index: batch
    given = {"limit_val_batches": 1, "val_check_interval": 2, "num_sanity_val_steps": 0}
    train(tmp_path, bar, steps=4, module=net, data=data, check_val_every_n_epoch=None, **given)
    assert notes == ["validating ..."] * 2
    assert bar.standing.note == ""
    # The same result once more is a new one.
    assert (bar.standing.results, bar.standing.results_step) == ({"knn20_top1": 0.5}, 4)


def test_a_line_says_what_is_known_and_no_more():
    standing = Standing(step=1234, total=20000)
    assert standing.line() == "step 1,234/20,000 (6.2%)"
    standing.images_per_s, standing.left = 3412.4, 3753.0
    assert standing.line().endswith("3,412 images/s  1:02:33 left")
    standing.read({"train/loss": torch.tensor(2.5), "train/loss/only": torch.tensor(2.5)})
    assert standing.line().endswith("loss 2.5000")
    assert Standing(step=7).line() == "step 7"


def test_results_belong_to_the_step_that_found_them():
    standing = Standing(step=100)
    standing.read({"val/knn20_top1": 0.25})
    standing.step = 200
    standing.read({"val/knn20_top1": 0.25, "train/loss": 1.0})
    assert standing.results_step == 100
    standing.read({"val/knn20_top1": 0.5, "train/loss": 1.0})
    assert standing.results_step == 200


@pytest.mark.parametrize("width", [40, 60, 110])
def test_narrow_terminals_break_no_line(width):
    standing = Standing(step=512, total=90000, images_per_s=10000.0, left=4000.0, loss=1.0)
    out = Console(file=io.StringIO(), width=width, force_terminal=True)
    out.print(standing)
    assert max(map(len, screen(out).splitlines())) <= width
    assert len(screen(out).splitlines()) == 2


def test_a_speed_is_shown_before_it_is_measured(tmp_path):
    bar = Progress(console=console())
    train(tmp_path, Throughput(), bar, steps=4, log_every_n_steps=50)
    assert not bar.standing.measured
    assert bar.standing.images_per_s is not None
    train(tmp_path, Throughput(), bar, steps=4)
    assert bar.standing.measured
