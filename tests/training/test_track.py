"""Tracking under a Lightning Trainer: sums over videos, going on after a stop, two ranks."""

import json
import logging

import pytest
import torch

from contramask.data.video_files import read_frames, read_mask
from contramask.data.videos import VideoSet, find_videos
from contramask.probes import track as probe
from contramask.probes.track import Clip, TrackRecipe, track
from contramask.training.track import TrackEvaluation, TrackVideos
from contramask.types import UserError
from tests.probes.moving import SIZE, write_set
from tests.probes.tiny import TinyBackbone
from tests.training.test_linear import trainer

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning"),
    # its processes are forked, which is the quickest way to have two
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

RECIPE = TrackRecipe(last_frames=2, radius=3, deltas=(1, 2, 30))
SIDES = {"short_side": SIZE[0], "long_side": SIZE[1]}


@pytest.fixture
def found(tmp_path) -> VideoSet:
    return find_videos(write_set(tmp_path / "set", {"cat": 4, "dog": 6, "owl": 3}))


def evaluation(found: VideoSet, folder, **options) -> TrackEvaluation:
    settings = {"weights": "tiny", "recipe": RECIPE, **SIDES} | options
    return TrackEvaluation(TinyBackbone(), found, folder, **settings)


def run(module: TrackEvaluation, **options) -> dict[str, float]:
    videos = TrackVideos(module.found)
    return trainer(**options).validate(module, datamodule=videos, verbose=False)[0]


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """Frames of every forward."""
    sizes: list[int] = []
    reads = probe.patch_features

    def patch_features(backbone, images, **options):
        sizes.append(len(images))
        return reads(backbone, images, **options)

    monkeypatch.setattr(probe, "patch_features", patch_features)
    return sizes


def test_its_numbers_are_those_of_the_videos(found, tmp_path):
    module = evaluation(found, tmp_path / "out")
    logged = run(module)
    mean, std = module.mean, module.std
    objects, right, questions = [], 0.0, 0.0
    for video in found.videos:
        frames = [(f / 255 - mean) / std for f in frames_of(video)]
        clip = Clip(frames, video.mask, video.objects, video.categories)
        record = track(TinyBackbone(), clip, RECIPE)
        assert module.result["videos"][video.name] == record
        objects += record["objects"].values()
        right += record["instances"]["2"]["right"]
        questions += record["instances"]["2"]["questions"]
    values = module.result["values"]
    assert len(objects) == values["objects"] == 6
    for letter in "jf":
        mean = sum(scores[f"{letter}_mean"] for scores in objects) / 6
        assert values[f"{letter}_rate"] == pytest.approx(mean, abs=1e-6)
    assert values["jf_rate"] == pytest.approx((values["j_rate"] + values["f_rate"]) / 2, abs=1e-6)
    assert values["instance_delta2_rate"] == pytest.approx(right / questions, abs=1e-6)
    assert questions == 2 * (2 + 4 + 1)
    assert "instance_delta30_rate" not in values
    assert (values["videos"], values["frames"], values["skipped_videos"]) == (3, 2 + 4 + 1, 0)
    assert logged["track/j_rate"] == pytest.approx(values["j_rate"])
    for fact in ("the last 2 frames", "window of 3 patches", "top 5", "48 x 68", "6 objects of 3"):
        assert fact in module.result["protocol"]


def frames_of(video):
    return read_frames(video.frames, SIZE, stored=SIZE)


def test_a_stopped_run_goes_on(found, tmp_path, counted, monkeypatch):
    whole = evaluation(found, tmp_path / "whole")
    run(whole)
    assert sum(counted) == 13
    counted.clear()
    broken = evaluation(found, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(type(found.videos[2]), "mask", stop_at("owl", type(found.videos[2]).mask))
        with pytest.raises(RuntimeError, match="stopped"):
            run(broken)
    counted.clear()
    again = evaluation(found, tmp_path / "out")
    run(again)
    assert counted == [3]  # the last video alone
    assert again.result == whole.result
    counted.clear()
    for other in ({"recipe": TrackRecipe(last_frames=1)}, {"weights": "others"}):
        run(evaluation(found, tmp_path / "out", **other))
        assert sum(counted) == 13
        counted.clear()


def test_another_precision_is_another_result(found, tmp_path, counted):
    plain, mixed = (evaluation(found, tmp_path) for _ in range(2))
    run(plain)
    counted.clear()
    run(mixed, precision="bf16-mixed")
    assert sum(counted) == 13
    assert mixed.result["protocol"] == plain.result["protocol"] + ", precision bf16-mixed"
    assert "precision" not in plain.result["protocol"]


def stop_at(name, mask):
    def stops(video, index):
        if video.name == name:
            raise RuntimeError("stopped")
        return mask(video, index)

    return stops


def test_masks_are_written_and_missed(found, tmp_path, counted):
    run(evaluation(found, tmp_path / "out"))
    counted.clear()
    run(evaluation(found, tmp_path / "out", masks=True))  # there were none
    assert sum(counted) == 13
    names = {path.relative_to(tmp_path / "out").as_posix() for path in tmp_path.glob("out/*/*.png")}
    counts = {"cat": 4, "dog": 6, "owl": 3}
    assert names == {f"{n}/{t:05d}.png" for n, count in counts.items() for t in range(1, count)}
    mask = read_mask(tmp_path / "out" / "dog" / "00005.png")
    assert mask.shape == SIZE
    truth = found.videos[1].mask(5)
    assert ((mask == truth).float().mean()) > 0.9
    counted.clear()
    (tmp_path / "out" / "dog" / "00003.png").unlink()
    run(evaluation(found, tmp_path / "out", masks=True))
    assert sum(counted) == 6


def test_masks_of_another_model_are_written_anew(found, tmp_path, counted):
    run(evaluation(found, tmp_path, masks=True))
    path = tmp_path / "dog" / "00003.png"
    first = path.read_bytes()
    path.write_bytes(b"of another model")
    run(evaluation(found, tmp_path, weights="others"))  # writes no masks, and has all numbers
    counted.clear()
    run(evaluation(found, tmp_path, weights="others", masks=True))
    assert sum(counted) == 13
    assert path.read_bytes() == first  # the test's backbone is the same
    counted.clear()
    run(evaluation(found, tmp_path, weights="others", masks=True))
    assert counted == []


def test_masks_of_a_video_that_was_stopped_are_written_anew(found, tmp_path, counted, monkeypatch):
    run(evaluation(found, tmp_path, masks=True))
    (tmp_path / "owl" / "00001.png").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(type(found.videos[2]), "mask", stop_at("owl", type(found.videos[2]).mask))
        with pytest.raises(RuntimeError, match="stopped"):
            run(evaluation(found, tmp_path, masks=True))
    assert not (tmp_path / "owl" / ".settings").exists()
    assert (tmp_path / "dog" / ".settings").is_file()


@pytest.mark.parametrize("names", [{"cat": 4, "dog": 6, "owl": 3}, {"cat": 4}])
def test_two_ranks_are_one_process(tmp_path, names: dict[str, int]):
    """Three videos leave the second rank one less, one leaves it none."""
    videos = find_videos(write_set(tmp_path / "two", names))
    one, two = (
        run(evaluation(videos, tmp_path / f"out{n}"), devices=n, strategy=strategy)
        for n, strategy in ((1, "auto"), (2, "ddp_fork"))
    )
    assert one == two
    assert one["track/videos"] == len(names)
    done = [
        [json.loads(line).get("name") for line in path.read_text().splitlines()[1:]]
        for path in sorted((tmp_path / "out2").glob(".parts-*-of-2.jsonl"))
    ]
    assert done == ([["cat", "owl"], ["dog"]] if len(names) == 3 else [["cat"], []])


def test_a_trainer_that_stops_early_is_told(found, tmp_path):
    with pytest.raises(UserError, match=r"2 of 3 videos not reached \(dog"):
        run(evaluation(found, tmp_path), limit_val_batches=1)


def test_bad_settings_are_told(found, tmp_path):
    with pytest.raises(UserError, match="batch_size is 0"):
        evaluation(found, tmp_path, batch_size=0)
    with pytest.raises(UserError, match="less than a patch"):
        evaluation(found, tmp_path, short_side=3)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with pytest.raises(UserError, match="features of frame 0 are not finite"):
        run(evaluation(found, tmp_path, std=(0.0, 0.0, 0.0), mean=(0.0, torch.nan, 0.0)))
