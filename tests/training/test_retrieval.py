"""Retrieval evaluation under a Lightning Trainer, alone, stopped half-way and on two ranks."""

import json
from contextlib import nullcontext

import pytest
import torch

from contramask import distributed
from contramask.functional.cleaning import Cleaning
from contramask.functional.warps import Warp
from contramask.probes import retrieval
from contramask.probes.features import Feature, frozen
from contramask.probes.retrieval import Reader
from contramask.probes.retrieval_images import detect_copies, retrieve_images
from contramask.probes.retrieval_patches import PatchBank
from contramask.probes.retrieval_tasks import Retrieval, RetrievalRecipe
from contramask.training.clean_loaders import CleanImages
from contramask.training.retrieval import RetrievalEvaluation, RetrievalImages
from contramask.types import UserError
from tests.probes.test_retrieval import MEAN, STD, batches, pictures, stock
from tests.probes.tiny import Loader, TinyBackbone, TinyData
from tests.training.test_linear import trainer

pytestmark = [
    # pytorch-lightning's own use of torch.utils._pytree
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning"),
    # its processes are forked, which is the quickest way to have two
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

FED = {"mean": MEAN, "std": STD, "feature": Feature(pool="mean")}
RECIPE = RetrievalRecipe(warps=("shift2", "noise30"), cleaning="zscore", copies=2, seed=3)
COUNTS = {"train": 23, "val": 14}


class Levels(TinyData):
    """Pictures of which a limit takes the first; batches of 5, in turns to whichever ranks ask."""

    unlabelled = False

    def clean_dataloader(self, split, limit=None):
        count = min(COUNTS[split], limit or COUNTS[split])
        labels, levels = self.all(split)
        found = batches(levels[:count], labels[:count], 5, split)
        return Loader(found[distributed.rank() :: distributed.world()])

    def all(self, split) -> tuple[list[int], torch.Tensor]:
        labels = [(7 * i) % 5 for i in range(COUNTS[split])]
        levels = pictures(labels, seed=len(split))
        return [-1] * len(labels) if self.unlabelled else labels, levels


def tiny() -> TinyBackbone:
    """As of a ViT all that is kept of it has a shape."""
    backbone = TinyBackbone()
    backbone.norm.num_batches_tracked = None
    return backbone


def evaluate(recipe=RECIPE, *, data=None, queries=9, limit=None, distractors=6, folder=None, **run):
    module = RetrievalEvaluation(tiny(), recipe, folder=folder, **FED)
    images = RetrievalImages(
        data or Levels(), recipe, limit=limit, queries=queries, distractors=distractors
    )
    (logged, *_) = trainer(**run).validate(module, datamodule=images, verbose=False)
    return module.result, logged


def bfloat16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.fixture
def forwards(monkeypatch) -> list[bool]:
    """Whether each forward was in bfloat16."""
    found: list[bool] = []

    def seen(read):
        def reads(*args, **options):
            found.append(torch.is_autocast_enabled("cpu"))
            return read(*args, **options)

        return reads

    for name in ("features", "patch_features"):
        monkeypatch.setattr(retrieval, name, seen(getattr(retrieval, name)))
    return found


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_its_numbers_are_those_of_the_tasks(precision: str, forwards):
    """All forwards are of one precision: those of loaders and those of warped or copied images."""
    mixed = precision == "bf16-mixed"
    result, logged = evaluate(precision=precision)
    assert len(forwards) > 5 + 3 + 2  # database, queries, distractors; and then some
    assert set(forwards) == {mixed}
    assert result["protocol"].endswith(", precision bf16-mixed" if mixed else "clean view")
    backbone, data, cleaning = TinyBackbone(), Levels(), Cleaning.parse("zscore")
    with frozen(backbone):
        reader = Reader(backbone, FED["feature"], MEAN, STD, bfloat16 if mixed else nullcontext)

        def taken(split, count):
            labels, levels = data.all(split)
            found = stock(reader, levels[:count], labels[:count])
            found.keys = [f"{split}{i}" for i in range(count)]
            return found

        originals = taken("val", 9)
        bank = PatchBank(reader, originals, cleaning=cleaning, metric="dot")
        expected = {
            "patches_chance": bank.chances(),
            "patches_shift2": bank.identify(Warp.parse("shift2")),
            "patches_noise30": bank.identify(Warp.parse("noise30"), seed=3),
            "images": retrieve_images(
                taken("val", 14), taken("train", 23), cleaning=cleaning, metric="cosine"
            ),
            "copies": detect_copies(
                reader, originals, taken("train", 6), copies=2, cleaning=cleaning,
                metric="cosine", seed=3,
            ),
        }  # fmt: skip
    assert result["parts"] == expected
    assert result["values"]["patches_noise30_same_patch_rate"] > 10 / 54
    for part, values in expected.items():
        for name, value in values.items():
            assert result["values"][f"{part}_{name}"] == value
            assert logged[f"retrieval/{part}_{name}"] == pytest.approx(value, abs=1e-6)
    for fact in (
        "patches of 9 warped val images by dot among the 54 of the originals",
        "14 val images by cosine among 23 of train, of which every rank holds at most 1 MiB",
        "18 copies (2 an original, 2 distortions each) by cosine among 15 originals",
        "cleaning zscore",
        "seed 3",
        "mean of patches of the last block",
    ):
        assert fact in result["protocol"]
    assert result["notes"] == []


@pytest.mark.parametrize(("queries", "limit"), [(9, None), (4, 5)])
def test_two_ranks_with_unequal_parts_count_what_one_counts(queries: int, limit: int | None):
    """Of few images the second rank has none at all."""
    found = [
        evaluate(queries=queries, limit=limit, devices=devices, strategy=strategy)[1]
        for devices, strategy in ((1, "auto"), (2, "ddp_fork"))
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert found[1]["retrieval/copies_queries"] == 2 * queries
    assert found[1]["retrieval/images_queries"] == (limit or 14)


def test_what_is_finished_is_not_done_again(tmp_path, monkeypatch):
    compute, asked = Retrieval.compute, []

    def until(stop):
        def one(self, part):
            asked.append(part)
            if part == stop:
                raise KeyboardInterrupt
            return compute(self, part)

        monkeypatch.setattr(Retrieval, "compute", one)
        asked.clear()

    whole, _ = evaluate()
    until("patches_noise30")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        evaluate(folder=tmp_path)
    assert asked == ["patches_chance", "patches_shift2", "patches_noise30"]
    until(None)
    again, _ = evaluate(folder=tmp_path)
    assert asked == ["patches_noise30", "images", "copies"]
    assert again == whole
    until(None)
    assert evaluate(folder=tmp_path)[0] == whole
    assert asked == []
    lines = [json.loads(x) for x in (tmp_path / "rank-0.jsonl").read_text().splitlines()]
    assert [line.get("name") for line in lines] == [None, *RECIPE.parts]


@pytest.mark.parametrize("what", ["images", "settings", "labels", "precision"])
def test_of_other_images_or_settings_everything_is_done_again(tmp_path, what: str):
    tasks = ("images", "copies")
    before, _ = evaluate(RetrievalRecipe(tasks=tasks), folder=tmp_path)
    recipe, given = RetrievalRecipe(tasks=tasks, seed=int(what == "settings")), {}
    if what == "images":
        given["limit"] = 13
    if what == "precision":
        given["precision"] = "bf16-mixed"
    if what == "labels":
        given["data"] = Levels()
        given["data"].unlabelled = True
    found, _ = evaluate(recipe, folder=tmp_path, **given)
    assert found == evaluate(recipe, **given)[0]
    assert found["values"] != before["values"]


def test_without_labels_what_needs_them_is_left_out_and_said():
    data = Levels()
    data.unlabelled = True
    result, _ = evaluate(data=data)
    assert "patches_shift2_same_patch_rate" in result["values"]
    assert "copies_micro_map" in result["values"]
    left = [n for n in result["values"] if "class" in n or n == "images_map"]
    assert left == []
    assert [note.partition(":")[0] for note in result["notes"]] == [
        "no original has a label",
        "none of 0 labelled images of val has its class among the 0 labelled images of the "
        "database",
    ]
    with pytest.raises(UserError, match="images need `cls` in their shards"):
        evaluate(RetrievalRecipe(tasks=("images",)), data=data)


def test_leave_one_out_reads_val_alone_and_counts_lonely_images():
    recipe = RetrievalRecipe(tasks=("images",), database="val")
    result, _ = evaluate(recipe, limit=6)
    values = result["values"]  # labels 0 2 4 1 3 0
    assert (values["images_queries"], values["images_database"]) == (2, 6)
    assert values["images_queries_without_relevant"] == 4
    assert result["notes"] == [
        "4 queries with no image of their class in the database are left out"
    ]
    assert "6 of val without the query" in result["protocol"]


def test_there_may_be_no_distractors():
    values = evaluate(RetrievalRecipe(tasks=("copies",), copies=1), distractors=0)[0]["values"]
    assert (values["copies_queries"], values["copies_database"]) == (9, 9)


def test_other_loaders_are_refused():
    module = RetrievalEvaluation(TinyBackbone(), RECIPE, **FED)
    with pytest.raises(UserError, match=r"2 loader\(s\) given; the tasks read database, queries"):
        trainer().validate(module, datamodule=CleanImages(Levels()), verbose=False)


@pytest.mark.parametrize("given", [{"queries": 0}, {"distractors": -1}])
def test_impossible_numbers_are_named(given):
    with pytest.raises(UserError, match="queries are 1 or more, distractors 0 or more"):
        evaluate(**given)
