"""Tiny trainings that collapse and are told so, healthy ones that are not, all undisturbed."""

import json
import logging
import math
import os
import socket
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import pytorch_lightning as pl
import torch
import torch.multiprocessing as mp

from contramask.callbacks.checkpoint import Checkpoints
from contramask.callbacks.diagnoses import NMI, RANK, RANKME, STD
from contramask.callbacks.watchdog import Watchdog
from contramask.objectives.dino import DINO
from contramask.objectives.objective import Objective
from contramask.optim import Optim
from contramask.schedule import Schedule
from contramask.tracking.jsonl import JSONLLogger, read_metrics
from contramask.tracking.wandb import Tracker
from contramask.types import Batch, Loss, Pass, UserError
from tests.builders import RECIPES, SIZE, StopAt, ToyStream, fit, pretraining, toy_batch
from tests.callbacks import watched_run

pytestmark = pytest.mark.filterwarnings(
    "ignore:Found .* in eval mode",  # teachers, on purpose
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:.isinstance.treespec, LeafSpec.",  # Lightning's own
)


def ramps(position: int, batch: int) -> Batch:
    """Images of a colour and a slope; views differ in light and noise: there is what to learn.

    Every batch is a function of its place.
    """
    draw = torch.Generator().manual_seed(position)
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in SIZE), indexing="ij")
    angle = 2 * math.pi * torch.rand(batch, 1, 1, 1, generator=draw)
    colour = torch.randn(batch, 3, 1, 1, generator=draw)
    image = colour + 2 * (angle.cos() * y + angle.sin() * x)  # (B, 3, H, W)

    def crops(number: int, height: int, width: int) -> torch.Tensor:
        light = 1 + 0.2 * torch.randn(number, batch, 1, 1, 1, generator=draw)
        noise = 0.05 * torch.randn(number, batch, 3, height, width, generator=draw)
        return image[..., :height, :width] * light + noise

    views = {
        "global": crops(2, *SIZE),
        "mild": crops(1, *SIZE),
        "local": crops(3, 8, 12),
        "shifted": crops(1, *SIZE),
    }
    return Batch(views=views, label=torch.full((batch,), -1), position=position)


class Ramps(ToyStream):
    """The stream of these images."""

    def __iter__(self) -> Iterator[Batch]:
        assert self.trainer is not None
        micro = self.trainer.global_step * self.trainer.accumulate_grad_batches
        while True:
            yield ramps(micro * self.batch, self.batch)
            micro += 1


class Agree(Objective):
    """SimSiam without predictor and stop-gradient: two views shall have the same feature."""

    def __init__(self, spec: Any):
        super().__init__()
        self.passes = (Pass("global"),)

    def forward(self, feats: Any, batch: Batch, step: Any) -> Loss:
        a, b = torch.nn.functional.normalize(feats[self.passes[0]].cls, dim=1).chunk(2)
        return Loss((a - b).square().sum(1).mean(), {})


def distil(**changes: Any) -> dict[str, Any]:
    return {"distil": partial(DINO, hidden=32, bottleneck=8, out=24, **changes)}


CHEAP = {"log_every_n_steps": 2}


def watched(
    folder: Path, objectives: Any, *, lr: float = 1e-2, steps: int = 80, **given: Any
) -> tuple[pl.Trainer, list[dict[str, Any]]]:
    """Train with a watchdog; what it told."""
    recipe = objectives if isinstance(objectives, str) else "moco"
    module = pretraining(
        recipe,
        optim=Optim(lr=Schedule(peak=lr, warmup=0.1), batch=None, decay=0.01),
        momentum=0.95,
        **given.pop("model", {}),
    )
    if not isinstance(objectives, str):
        module = rebuilt(module, objectives)
    every = given.pop("every", 8)
    dog = Watchdog(folder, every=every, **given.pop("dog", {}))
    callbacks = [dog, *given.pop("callbacks", [])]
    stream = given.pop("stream", None) or Ramps(24)
    logger = JSONLLogger(folder)
    trainer = fit(
        module, steps=steps, callbacks=callbacks, stream=stream, logger=logger, **CHEAP | given
    )
    return trainer, told(folder)


def rebuilt(module: Any, objectives: Any) -> Any:
    """The same backbone and rates with other objectives."""
    torch.manual_seed(3)
    return type(module)(module.backbone, objectives, optim=module.optim, momentum=module.momentum)


def told(folder: Path) -> list[dict[str, Any]]:
    path = folder / "diagnoses.jsonl"
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time"} for row in rows]


def curve(folder: Path, key: str) -> list[float]:
    return [row[key] for row in read_metrics(folder) if key in row]


# ---- collapse -----------------------------------------------------------------------------------


def test_features_that_shall_only_agree_become_a_point(tmp_path, caplog):
    _, found = watched(tmp_path, {"agree": Agree})
    assert [(d["name"], d["event"]) for d in found] == [("uniform_collapse", "begins")]
    assert curve(tmp_path, STD)[-1] < 0.03 < 0.3 < curve(tmp_path, STD)[0]
    ones = curve(tmp_path, "watchdog/uniform_collapse")
    assert ones == sorted(ones)
    assert (ones[0], ones[-1]) == (0, 1)
    (said,) = [r for r in caplog.records if "uniform_collapse" in r.getMessage()]
    assert said.levelno == logging.WARNING
    assert said.getMessage().startswith(f"watchdog: update {found[0]['step']}: uniform_collapse: ")
    assert "nothing can be read" in said.getMessage()
    assert "arXiv:2011.10566" in said.getMessage()


def test_distillation_without_sharpening_becomes_uniform(tmp_path):
    _, found = watched(tmp_path, distil(teacher_temperature=1.0, norm_last_layer=False))
    begun = {d["name"]: d for d in found if d["event"] == "begins"}
    assert "distil/same_codes" in begun
    assert "are uniform" in begun["distil/same_codes"]["seen"]


def test_distillation_without_centring_has_one_prototype(tmp_path):
    _, found = watched(tmp_path, distil(teacher_temperature=0.01, centre_momentum=1.0))
    begun = {d["name"]: d for d in found if d["event"] == "begins"}
    assert "distil/one_prototype" in begun


def test_views_that_share_nothing_leave_a_contrast_at_chance(tmp_path):
    _, found = watched(tmp_path, "moco", stream=ToyStream(24), steps=60)
    assert {d["name"] for d in found} == {"contrast/at_chance"}


def test_noise_cannot_be_predicted(tmp_path):
    _, found = watched(tmp_path, "mae", stream=ToyStream(24), steps=60)
    assert {d["name"] for d in found} == {"masked/predicts_mean"}


# The histograms of so small images are too hard for MaskFeat in so few updates.
HEALTHY = [
    *("dino", "hybrid", "ijepa"),
    *(pytest.param(k, marks=pytest.mark.slow) for k in ("beit", "cmae", "ibot", "mae", "simclr")),
]


@pytest.mark.parametrize("recipe", HEALTHY)
def test_a_healthy_run_is_left_in_peace(tmp_path, recipe, caplog):
    watched(tmp_path, recipe)
    assert told(tmp_path) == []
    assert "watchdog" not in caplog.text
    rows = read_metrics(tmp_path)
    judged = {k for row in rows for k in row if k.startswith("watchdog/")} - {STD, RANK}
    assert len(judged) >= 3
    assert all(row[k] == 0 for row in rows for k in judged & row.keys() if "chance/" not in k)


# ---- undisturbed --------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_is_bitwise_the_same(tmp_path, accumulate, precision):
    given = {"accumulate_grad_batches": accumulate, "precision": precision, "steps": 4}
    alone = watched_run.state(watched_run.train(tmp_path / "alone", **given))
    logger = JSONLLogger(tmp_path / "run")
    dog = Watchdog(tmp_path / "run", every=1, images=3, warmup=0.0)
    watched = watched_run.state(watched_run.train(tmp_path / "run", dog, logger=logger, **given))
    assert alone.keys() == watched.keys()
    assert [k for k in alone if not torch.equal(alone[k], watched[k])] == []
    assert len(curve(tmp_path / "run", STD)) == 4  # it did look


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_trained_as_without_it(recipe):
    states = []
    for dogs in ([], [Watchdog(every=1)]):
        module = pretraining(recipe, drop_path=0.2)
        fit(module, steps=3, callbacks=dogs)
        states.append({**module.state_dict(), "random": torch.random.get_rng_state()})
    assert [k for k, v in states[0].items() if not torch.equal(v, states[1][k])] == []


def test_every_module_keeps_its_mode(tmp_path):
    modes = []
    for dogs in ([], [Watchdog(every=1)]):
        module = pretraining("dino")
        next(m for m in module.backbone.modules() if isinstance(m, torch.nn.LayerNorm)).eval()
        fit(module, steps=2, callbacks=[*dogs, Modes(modes)])
    assert modes[0] == modes[1]
    assert {True, False} == set(modes[0])


class Modes(pl.Callback):
    def __init__(self, kept: list[list[bool]]):
        self.kept = kept

    def on_train_end(self, trainer, pl_module) -> None:
        self.kept.append([part.training for part in pl_module.modules()])


# ---- told once, whatever happens ----------------------------------------------------------------


@pytest.mark.parametrize("cut", [21, 47])
def test_a_resumed_run_tells_the_same(tmp_path, cut):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    straight, found = watched(whole, {"agree": Agree})
    assert found
    stopped, _ = watched(parts, {"agree": Agree}, callbacks=[StopAt(cut)])
    assert stopped.global_step == cut
    stopped.save_checkpoint(parts / "at.ckpt")
    with (parts / "diagnoses.jsonl").open("a") as file:  # told by a part that is lost, and cut off
        file.write('{"step": 79, "name": "lost"}\n{"step": 3, "na')
    resumed, again = watched(parts, {"agree": Agree}, ckpt=parts / "at.ckpt")
    assert again == found
    one, other = (dog_of(trainer).state_dict() for trainer in (straight, resumed))
    assert one == other
    for key in (STD, RANK, "watchdog/uniform_collapse"):
        assert curve(whole, key) == curve(parts, key)


def dog_of(trainer: pl.Trainer) -> Watchdog:
    (dog,) = [c for c in trainer.callbacks if isinstance(c, Watchdog)]
    return dog


def test_told_when_it_ends(tmp_path):
    """Numbers of an analysis that come and go; a remark is no warning."""
    values = {**dict.fromkeys(range(3, 12), 0.001), **dict.fromkeys(range(12, 30), 0.4)}
    _, found = watched(tmp_path, "moco", steps=30, every=1, callbacks=[Analysis(values)])
    mine = [(d["name"], d["event"], d["step"], d["since"]) for d in found]
    # It logs after the watchdog's turn, so a look knows what was found before.
    assert mine == [
        ("attention_collapse", "begins", 6, 6),
        ("attention_collapse", "ends", 15, 6),
    ]
    assert all(d["kind"] == "remark" for d in found)


class Analysis(pl.Callback):
    """Logs numbers by update."""

    def __init__(self, values: dict[int, float]):
        self.values = values

    def on_train_batch_end(self, trainer, pl_module, *args: Any) -> None:
        if (value := self.values.get(trainer.global_step)) is not None:
            for block in (0, 1):
                pl_module.log(f"{NMI}{block:02d}", value + 1e-5 * trainer.global_step)


class Alerted(Tracker):
    """A tracker whose run is here."""

    def __init__(self, folder: Path):
        super().__init__(folder, project="p", online=False, init={})
        self.run = MagicMock()

    def _start(self) -> Any:
        return self.run


def test_stop_ends_training_and_keeps_its_checkpoint(tmp_path, caplog):
    def train(*more: pl.Callback, **given: Any) -> pl.Trainer:
        module = rebuilt(pretraining("moco", optim=Optim(lr=1e-2, batch=None)), {"agree": Agree})
        dog = Watchdog(tmp_path, every=8, stop=True)
        saver = Checkpoints(tmp_path / "checkpoints", every=1000)
        given |= {"enable_checkpointing": True, "callbacks": [dog, *more, saver]}
        return fit(module, steps=300, stream=Ramps(24), **CHEAP | given)

    tracker = Alerted(tmp_path)
    trainer = train(logger=tracker)
    (found,) = told(tmp_path)
    assert trainer.global_step == found["step"] < 150
    ((title, text), _) = tracker.run.alert.call_args
    assert (title, text[:8]) == ("uniform_collapse begins", f"update {found['step']}"[:8])
    assert tracker.run.alert.call_count == 1
    assert f"training stops after update {found['step']} because of uniform_collapse" in caplog.text
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert f"{last} is kept" in caplog.text
    # Continued, it goes on: it was told.
    trainer = train(StopAt(found["step"] + 30), ckpt=last)
    assert trainer.global_step == found["step"] + 30
    assert told(tmp_path) == [found]


@pytest.mark.slow  # it starts two processes
def test_two_ranks_see_alike_and_stop_together(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_rank, (port, str(tmp_path)), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in range(2))
    assert first["rows"][STD] == second["rows"][STD]
    assert len(first["rows"][STD]) > 3
    # An analysis told the first rank alone that the rank of features falls.
    assert first["standing"].keys() == {"dimensional_collapse"}
    assert second["standing"] == {}
    assert first["step"] == second["step"] == first["standing"]["dimensional_collapse"] < 30
    assert len(told(tmp_path)) == 1


class AnalysisOfOne(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, *args: Any) -> None:
        if trainer.is_global_zero:
            now = torch.tensor(20.0 if trainer.global_step < 7 else 1 / trainer.global_step)
            trainer.callback_metrics.update({RANKME: now})


def _rank(index: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {k: str(v) for k, v in place.items()}
    # As torchrun would: Lightning then starts no processes of its own.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}
    warnings.simplefilter("ignore")
    dog = Watchdog(folder, every=2, stop=True)
    ranks = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    watching = [AnalysisOfOne(), dog]
    trainer = fit(pretraining("moco"), steps=30, callbacks=watching, stream=ToyStream(8), **ranks)
    found = {**dog.history.state_dict(), "step": trainer.global_step}
    torch.save({**found, "standing": dog.chart.standing}, Path(folder) / f"{index}.pt")


# ---- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "steps"), [(0, []), (2, [1, 2, 4, 5]), (4, [1, 4, 5])])
def test_when_it_looks(tmp_path, every, steps):
    watched(tmp_path, "hybrid", steps=5, every=every, stream=ToyStream(4))
    assert [r["step"] for r in read_metrics(tmp_path) if STD in r] == steps


def test_without_a_folder_there_is_no_file(tmp_path):
    module = rebuilt(pretraining("moco", optim=Optim(lr=1e-2, batch=None)), {"agree": Agree})
    fit(module, steps=80, callbacks=[Watchdog(every=8)], stream=Ramps(24), logger=False, **CHEAP)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_costs_the_line_alone(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    dog = Watchdog(tmp_path / "file" / "run", every=8)
    module = rebuilt(pretraining("moco", optim=Optim(lr=1e-2, batch=None)), {"agree": Agree})
    trainer = fit(module, steps=80, callbacks=[dog], stream=Ramps(24), logger=False, **CHEAP)
    assert trainer.global_step == 80
    assert "no line in" in caplog.text


def test_mistakes_are_told(tmp_path):
    with pytest.raises(UserError, match=r"every is -1, images 256 .*watchdog\.every"):
        Watchdog(every=-1)
    with pytest.raises(UserError, match=r"images 1 and warmup 0\.1"):
        Watchdog(images=1)
    with pytest.raises(UserError, match=r"warmup 1\.5"):
        Watchdog(warmup=1.5)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    with pytest.raises(UserError, match=r"LightningModule is no Pretraining.*watchdog\.every: 0"):
        Watchdog().setup(trainer, pl.LightningModule(), "fit")
    Watchdog(every=0).setup(trainer, pl.LightningModule(), "fit")


def test_the_ramps_are_functions_of_their_place():
    assert torch.equal(ramps(8, 3)["views"]["global"], ramps(8, 3)["views"]["global"])
    assert ramps(8, 3)["views"].keys() == toy_batch(0, 2)["views"].keys()
