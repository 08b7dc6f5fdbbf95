"""Which retrieval tasks there are, what they read, and their parts one by one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from contramask.distributed import gather
from contramask.errors import need_one_of
from contramask.functional.cleaning import Cleaning
from contramask.functional.retrieval import Metric
from contramask.functional.warps import Warp
from contramask.probes.evaluation import Split
from contramask.probes.retrieval import Reader, Stock, Values
from contramask.probes.retrieval_images import detect_copies, retrieve_images
from contramask.probes.retrieval_patches import PatchBank, Same
from contramask.types import UserError, fold

Task = Literal["patches", "images", "copies"]
TASKS: tuple[Task, ...] = get_args(Task)
# In the ranges of Vanyan et al.: 1 to 4 px, 2 to 8 px, 10 to 40 / 255, 5 to 20 degrees, 0.8 to 1.2.
WARPS = (
    *("shift1", "shift2", "shift4", "blur2", "blur4", "blur8", "noise10", "noise20", "noise40"),
    *("rotate5", "rotate10", "rotate20", "scale0.8", "scale0.9", "scale1.1", "scale1.2"),
)

Loaded = Literal["database", "queries", "originals", "distractors"]
# What is read, in this order, and from which split.
LOADERS: dict[Loaded, Split] = {
    "database": "train",
    "queries": "val",
    "originals": "val",
    "distractors": "train",
}
_NEEDS: dict[Task, tuple[Loaded, ...]] = {
    "patches": ("originals",),
    "images": ("database", "queries"),
    "copies": ("originals", "distractors"),
}


@dataclass(frozen=True)
class RetrievalRecipe:
    """What is looked for and how.

    Attributes:
        tasks: `patches` of transformed images among those of originals; `images` of the class of a
            query; `copies`, the originals of distorted images.
        warps: of `patches`, by words of `Warp`.
        metric: for all tasks; None: the inner product for patches (Vanyan et al.), the cosine for
            the others (DINO).
        cleaning: of features, by a word of `Cleaning`, fitted on what is searched.
        same: what counts as the same patch, see `PatchBank.identify`.
        copies: of each original.
        database: where `images` are looked for; `val`: among the queries, each left out itself.
        seed: of noise and distortions.

    Raises:
        UserError: for words that mean nothing.
    """

    tasks: tuple[Task, ...] = TASKS
    warps: tuple[str, ...] = WARPS
    metric: Metric | None = None
    cleaning: str = "raw"
    same: Same = "index"
    copies: int = 4
    database: Split = "train"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UserError(f"retrieval: no task; there are {', '.join(TASKS)}; set --tasks")
        for task in self.tasks:
            need_one_of(task, Task, "retrieval: the task", "--tasks")
        if "patches" in self.tasks and not self.warps:
            raise UserError("retrieval: patches without a warp; name some, e.g. --warps [rotate5]")
        for word in self.warps:
            Warp.parse(word)
        Cleaning.parse(self.cleaning)
        if self.copies < 1:
            raise UserError(
                f"retrieval: copies is {self.copies}; allowed are 1 and more; set --copies"
            )

    @property
    def loaders(self) -> list[Loaded]:
        """What the tasks read, in the order of `LOADERS`."""
        wanted = {name for task in self.tasks for name in _NEEDS[task]}
        if self.database == "val":  # leave-one-out: the queries are the database
            wanted.discard("database")
        return [name for name in LOADERS if name in wanted]

    @property
    def parts(self) -> list[str]:
        """What is computed and kept one by one."""
        warps = [f"patches_{Warp.parse(word)}" for word in self.warps]
        found = ["patches_chance", *dict.fromkeys(warps)] if "patches" in self.tasks else []
        return [*found, *(task for task in ("images", "copies") if task in self.tasks)]

    def metric_of(self, task: Task) -> Metric:
        """The metric of a task."""
        return self.metric or ("dot" if task == "patches" else "cosine")


class Retrieval:
    """The parts of a recipe, each computed over all ranks when asked for.

    All ranks ask for the same parts in the order of the recipe. What a part has read for the last
    time is let go.

    Args:
        recipe: what is looked for.
        reader: of features.
        stocks: this rank's images, by the names of `recipe.loaders`.
    """

    def __init__(self, recipe: RetrievalRecipe, reader: Reader, stocks: Mapping[Loaded, Stock]):
        self.recipe, self.reader, self.stocks = recipe, reader, dict(stocks)
        self._cleaning = Cleaning.parse(recipe.cleaning)
        self._bank: PatchBank | None = None

    def compute(self, part: str) -> Values:
        """The values of one of `recipe.parts`, once. Raises `UserError`, see the tasks."""
        recipe, shared = self.recipe, {"cleaning": self._cleaning}
        if part in ("images", "copies"):
            self._bank = None  # it is large, and patches come first
        if part == "images":
            # Taken out: nothing else reads them, and the database is large too.
            queries = self.stocks.pop("queries")
            database = self.stocks.pop("database", queries)
            metric = recipe.metric_of("images")
            return retrieve_images(queries, database, metric=metric, **shared)
        if part == "copies":
            return detect_copies(
                self.reader,
                self.stocks["originals"],
                self.stocks["distractors"],
                copies=recipe.copies,
                metric=recipe.metric_of("copies"),
                seed=recipe.seed,
                **shared,
            )
        if self._bank is None:
            metric = recipe.metric_of("patches")
            originals = self.stocks["originals"]
            self._bank = PatchBank(self.reader, originals, metric=metric, **shared)
        if part == "patches_chance":
            return self._bank.chances()
        wanted = Warp.parse(part.removeprefix("patches_"))
        return self._bank.identify(wanted, same=recipe.same, seed=recipe.seed)

    def checksum(self) -> list[int]:
        """A number of all images, labels and keys that are read, whatever rank has them."""
        sums: list[int] = []
        for name in self.recipe.loaders:
            stock = self.stocks[name]
            keys = sum(fold(key) for key in stock.keys) % 2**62
            mine = [(stock.ids * (2 * stock.labels + 3)).sum(), stock.ids.new_tensor(keys)]
            rows = gather(torch.stack(mine)[None]).mT.tolist()
            sums += [sum(row) % 2**62 for row in rows]
        return sums


def told(recipe: RetrievalRecipe, values: Mapping[str, Any]) -> list[str]:
    """What was left out and why, in sentences.

    Raises:
        UserError: if nothing is left.
    """
    notes: list[str] = []
    if "patches" in recipe.tasks and "patches_chance_same_class_rate" not in values:
        notes.append("no original has a label: rates of classes are left out")
    if "images" in recipe.tasks:
        able, lost = values["images_queries"], values["images_queries_without_relevant"]
        if not able:
            why = f"none of {lost} labelled images of val has its class among the "
            why += f"{values['images_database']} labelled images of the database"
            if recipe.parts == ["images"]:
                raise UserError(
                    f"retrieval: {why}; images need `cls` in their shards and classes of two "
                    "images or more; set data.val and data.train, or choose other --tasks"
                )
            notes.append(f"{why}: retrieval of images is left out")
        elif lost:
            notes.append(
                f"{lost} queries with no image of their class in the database are left out"
            )
    return notes
