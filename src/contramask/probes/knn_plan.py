"""Which k-NN numbers are wanted, and how their table is read."""

from dataclasses import dataclass
from typing import Literal

from contramask.errors import need_one_of
from contramask.functional.cleaning import Cleaning
from contramask.functional.neighbours import Weights, check_k, check_temperature
from contramask.functional.search import Metric
from contramask.types import UserError

WeightsWord = Literal["auto", "exp", "uniform"]

# How many channels of highest variance the table removes, as far as the width allows, and how many
# their share of the variance is told for.
TOPS = (1, 5, 10, 20, 50, 100, 200, 400)


@dataclass(frozen=True)
class TablePlan:
    """Which numbers are wanted: every metric with every cleaning and every k.

    Attributes:
        metrics: `cosine` (DINO, arXiv:2104.14294), `dot`, the inner product (Vanyan et al.), `l2`.
        cleanings: `raw`, `zscore`, `pca`, `pca64`, `top20`, see `Cleaning`.
        ks: numbers of neighbours; DINO's are 10, 20, 100, 200, Vanyan's is 1.
        temperature: T of weighted votes.
        weights: `auto`, exp(cosine / T) for cosine and uniform votes for the others, which have no
            official temperature; `uniform` for all; `exp` for cosine alone.
        leave_one_out: queries are the bank itself, each without its own row.

    Raises:
        UserError: for another word, no word at all, a k below 1, or `exp` of another metric.
    """

    metrics: tuple[Metric, ...] = ("cosine",)
    cleanings: tuple[str, ...] = ("raw",)
    ks: tuple[int, ...] = (1, 10, 20, 100, 200)
    temperature: float = 0.07
    weights: WeightsWord = "auto"
    leave_one_out: bool = False

    def __post_init__(self) -> None:
        for name in ("metrics", "cleanings", "ks"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise UserError(
                    f"k-NN: {name} is {list(given)}; allowed are one or more, each once; set {name}"
                )
        for metric in self.metrics:
            need_one_of(metric, Metric, "k-NN: metric", "metrics")
        for word in self.cleanings:
            Cleaning.parse(word)
        need_one_of(self.weights, WeightsWord, "k-NN: weights", "weights")
        check_temperature(self.temperature)
        if min(self.ks) < 1:
            raise UserError(f"k-NN: ks is {list(self.ks)}; allowed are 1 and more; set ks")
        if self.weights == "exp" and set(self.metrics) != {"cosine"}:
            raise UserError(
                f"k-NN: weights is exp with metrics {list(self.metrics)}; exp(s / T) is for "
                "cosine alone; set weights to auto or uniform"
            )

    def weights_of(self, metric: Metric) -> Weights:
        """How the neighbours found by this metric vote."""
        if self.weights == "auto":
            return "exp" if metric == "cosine" else "uniform"
        return self.weights

    def possible(self, rows: int) -> tuple[int, ...]:
        """The ks that a bank of so many rows allows.

        Raises:
            UserError: if it allows none.
        """
        most = rows - self.leave_one_out
        if most < min(self.ks):
            check_k(min(self.ks), rows, own=self.leave_one_out)
        return tuple(k for k in self.ks if k <= most)

    def protocol(self, bank: int, features: str, queries: str) -> str:
        """One line that says everything needed to redo the numbers.

        Args:
            bank: how many train images.
            features: what they are, e.g. "class token of the last block ..., resize 256".
            queries: how many and which, e.g. "50000 val images".
        """
        weighted = f"votes weighted by exp(cosine/{self.temperature:g})"
        how = {"exp": weighted, "uniform": "uniform votes, ties to the nearest"}
        metrics = " and ".join(f"{m} ({how[self.weights_of(m)]})" for m in self.metrics)
        cleanings = [Cleaning.parse(word) for word in self.cleanings]
        words = [f"{c}: {c.about()}" for c in cleanings if c.kind != "top"]
        if tops := [str(c.number) for c in cleanings if c.kind == "top"]:
            words.append(f"top: {', '.join(tops)} channels of highest variance on train removed")
        cleaned = "; ".join(["", *words]) if self.cleanings != ("raw",) else ""
        ks = ",".join(map(str, self.possible(bank)))
        left_out = ", each query without its own row" if self.leave_one_out else ""
        return (
            f"k-NN: {metrics}, k = {ks}, bank of {bank} train images{left_out}; {features}{cleaned}"
            f"; exact search in float32, of equally near images the first in train; {queries}"
        )

    def notes(self, rows: int) -> list[str]:
        """What is left out, one line each."""
        skipped = [k for k in self.ks if k not in self.possible(rows)]
        if not skipped:
            return []
        listed = ", ".join(map(str, skipped))
        cells = len(skipped) * len(self.metrics) * len(self.cleanings)
        return [f"k = {listed}: more than the bank of {rows} rows allows, {cells} numbers skipped"]


def standard_cleanings(width: int) -> tuple[str, ...]:
    """The cleanings of the whole table for features of this width."""
    return ("raw", "zscore", "pca", *(f"top{m}" for m in TOPS if m < width))
