"""k-NN accuracy for several metrics, cleanings and k at once, on a bank that is spread over ranks.

Vanyan et al., 2024 (arXiv:2401.00463) read an MAE by 1-NN of plain inner products and find that a
few channels of high variance break it. Whether it is they, the metric or the vote is what the table
of metric by cleaning tells.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from contramask.distributed import gather, largest, rank, total, world
from contramask.functional.channels import top_share
from contramask.functional.cleaning import ELEMENTS, Cleaning, fit
from contramask.functional.neighbours import ballot
from contramask.functional.search import Search, bytes_held
from contramask.probes.extraction import gather_rows
from contramask.probes.knn_plan import TOPS, TablePlan
from contramask.types import UserError

# Rows of a bank that are cleaned at once, queries whose votes are counted at once.
PART, COUNTED = 32768, 1024

# Queries that all ranks together search for at once.
BLOCK = 2048


@dataclass(frozen=True, eq=False)
class Shard:
    """This rank's rows of the bank, any number, and the labels of all.

    Attributes:
        rows: features.
        numbers: of these rows in the whole bank, ascending; of equally near rows the lower counts.
        labels: by number, of all N rows of all ranks.
    """

    rows: Float[Tensor, "n F"]
    numbers: Int[Tensor, " n"]
    labels: Int[Tensor, " N"]


class Scores:
    """Accuracies of one cleaning for every metric and k, counted over blocks of queries.

    All ranks make one alike and call `add` equally often, each with queries of its own, also none,
    and then `table`. Each rank searches its part of the bank for the queries of all, and what they
    find is merged. The numbers are those of one process, bit for bit as far as the statistics of
    the cleaning are: these are sums over ranks in float64, rounded to float32.

    Memory beside the bank: `peak_bytes`, of which no term grows with the bank, but for 16 bytes of
    number and label for each of its rows.

    Args:
        plan: metrics, votes.
        cleaning: which.
        bank: this rank's part.
        ks: how many neighbours vote, see `TablePlan.possible`.
        classes: the number of classes C.
        device: where the search is made, parts of the bank are moved there; None: where its rows
            are.

    Raises:
        UserError: for fewer than two classes; see also `fit`.
    """

    def __init__(
        self,
        plan: TablePlan,
        cleaning: Cleaning,
        bank: Shard,
        *,
        ks: tuple[int, ...],
        classes: int,
        device: torch.device | None = None,
    ):
        if classes < 2:
            raise UserError(
                f"probe: the labels have {classes} class; a probe needs at least two; see `cls` in "
                "the shards"
            )
        device = device or bank.rows.device
        self.plan, self.ks, self.classes = plan, ks, classes
        self.bank = Shard(bank.rows, bank.numbers.to(device), bank.labels.to(device))
        self.cleaner = fit(cleaning, bank.rows, total=total, device=device)
        self.right = torch.zeros((len(plan.metrics), len(ks), 2), dtype=torch.long, device=device)
        self.images = torch.zeros((), dtype=torch.long, device=device)

    @torch.no_grad()
    def add(
        self, x: Float[Tensor, "B F"], y: Int[Tensor, " B"], own: Int[Tensor, " B"] | None = None
    ) -> None:
        """Queries of this rank and their labels.

        Args:
            x: features.
            y: labels, 0..C-1.
            own: their numbers in the bank, to be left out.

        Raises:
            UserError: for features that are not finite.
        """
        sizes = gather(torch.tensor([len(x)], device=x.device)).tolist()
        queries = gather_rows(x)
        if not queries.isfinite().all():
            raise UserError(
                "k-NN: features of queries are not finite; look for what broke the backbone, or "
                "choose another source"
            )
        first = sum(sizes[: rank()])
        mine = slice(first, first + len(x))
        searches = self._search(queries, None if own is None else gather_rows(own))
        for m, search in enumerate(searches):
            found = search.found(gather=gather if world() > 1 else None)
            self._count(m, found.similarities[mine], found.numbers[mine], y)
        self.images += len(y)

    def finished(self) -> dict[str, Any]:
        """All of it, as JSON can hold it; all ranks call it, after the last `add`.

        Returns:
            `rows`, one for each metric and k: `metric`, `cleaning`, `k`, `top1`, `top5`, fractions,
            top5 None for fewer than five neighbours or six classes; `images`: how many queries;
            `width`: of cleaned features; `variance_share`: m -> the share of the train features'
            variance in the m channels that vary most; `peak_bytes`.
        """
        images = int(total(self.images))
        shares = (total(self.right).double() / max(1, images)).tolist()
        rows = [
            {
                "metric": metric,
                "cleaning": str(self.cleaner.cleaning),
                "k": k,
                "top1": round(shares[m][j][0], 6),
                "top5": round(shares[m][j][1], 6) if k >= 5 and self.classes > 5 else None,
            }
            for m, metric in enumerate(self.plan.metrics)
            for j, k in enumerate(self.ks)
        ]
        variance = self.cleaner.variance.double()
        own = self.cleaner.cleaning
        removed = (own.number,) if own.kind == "top" and own.number else ()
        most = [m for m in (*TOPS, *removed) if m < len(variance)]
        return {
            "rows": rows,
            "images": images,
            "width": self.cleaner.width,
            "variance_share": {str(m): round(float(top_share(variance, m)), 6) for m in most},
            "peak_bytes": self.peak_bytes,
        }

    @property
    def peak_bytes(self) -> int:
        """The most that was held beside the features, for blocks of `BLOCK` queries.

        `bytes_held` of the search of each metric; the rows of a part, as they are and cleaned;
        votes of 1,024 queries, 4 C bytes for each k and twice more; for the cleaning 64 MiB and
        four matrices of F x F in float64.
        """
        width, out, k = len(self.cleaner.variance), self.cleaner.width, max(self.ks)
        device = self.cleaner.variance.device
        held = bytes_held(BLOCK + world(), out, k, device, ranks=world())
        votes = 4 * COUNTED * self.classes * (len(self.ks) + 2)
        cleaned = 8 * (PART + BLOCK) * (width + out) + 8 * ELEMENTS + 32 * width**2
        return len(self.plan.metrics) * held + votes + cleaned

    def _search(self, queries: Tensor, own: Tensor | None) -> list[Search]:
        cleaned = self.cleaner(queries)
        searches = [
            Search(cleaned, k=max(self.ks), metric=metric, centre=self.cleaner.centre, own=own)
            for metric in self.plan.metrics
        ]
        parts = (self.bank.rows.split(PART), self.bank.numbers.split(PART))
        for rows, numbers in zip(*parts, strict=True):
            part = self.cleaner(rows)  # once for all metrics
            for search in searches:
                search.add(part, numbers)
        return searches

    def _count(self, m: int, near: Tensor, numbers: Tensor, y: Tensor) -> None:
        weights = self.plan.weights_of(self.plan.metrics[m])
        options = {"ks": self.ks, "classes": self.classes, "weights": weights}
        for part in torch.arange(len(y), device=y.device).split(COUNTED):
            chosen = self.bank.labels[numbers[part]]
            votes = ballot(near[part], chosen, temperature=self.plan.temperature, **options)
            for j, scores in enumerate(votes.values()):
                places = place_of(y[part], scores)
                for i, top in enumerate((1, 5)):
                    self.right[m, j, i] += (places < top).sum()


def place_of(labels: Int[Tensor, " B"], scores: Float[Tensor, "B C"]) -> Int[Tensor, " B"]:
    """How many classes are ranked before the right one; of equal scores the lower class is first.

    The official evaluation ranks so, also the classes that have no vote. torchmetrics leaves the
    order of equals to `topk`, where it is not defined.
    """
    right = scores.gather(1, labels[:, None])
    lower = torch.arange(scores.shape[1], device=labels.device) < labels[:, None]
    return ((scores > right) | ((scores == right) & lower)).sum(1)


def blocks(queries: int, device: torch.device | None = None) -> list[slice]:
    """Slices of this rank's queries, as many as the rank with most has; the last ones may be empty.

    Args:
        queries: of this rank.
        device: the one the process group speaks through.
    """
    size = max(1, BLOCK // world())
    most = int(largest(torch.tensor(-(-queries // size), device=device)))
    return [slice(i * size, (i + 1) * size) for i in range(most)]
