"""What exact k-NN search costs: memory beside the bank, and time against cdist and topk.

    uv run python benchmarks/knn.py memory [--full]
    uv run python benchmarks/knn.py speed [--rounds 5]

`memory` builds ImageNet's bank (1,281,167 x 384, 1.8 GiB) and measures how much more the process
ever holds, by the kernel's high-water mark: once for 50,000 queries and the first 33,000 rows of
the bank, once for 2,048 queries and the whole bank. No term of the bound grows with both, so that
50,000 queries and the whole bank hold what the larger one does; `--full` runs just that (49 TFLOP a
metric). `speed` lets both sides take turns in one process.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from contramask.functional.neighbours import ballot, nearest
from contramask.functional.search import Metric, Search, bytes_held

ROWS, QUERIES, DIM, K, CLASSES = 1_281_167, 50_000, 384, 200, 1000


def clusters(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows around the centres of their classes, filled in place: nothing but them is held."""
    centres = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (rows,), generator=generator)
    x = torch.empty(rows, DIM)
    for part, label in zip(x.split(4096), y.split(4096), strict=True):
        part.normal_(generator=generator).mul_(3).add_(centres[label])
    return x, y


def highest() -> int:
    """The most bytes this process has ever held."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def held(queries: Tensor, bank: Tensor, metric: Metric) -> int:
    """How far a search lifts the high-water mark."""
    before = highest()
    search = Search(queries, k=K, metric=metric, centre=bank[0])
    search.add(bank, torch.arange(len(bank)))
    search.found()
    return highest() - before


def memory(full: bool) -> None:
    """Smaller cases first: the mark only rises."""
    warm, _ = clusters(300, 1)
    torch.mm(warm, warm.mT).topk(5)
    bank, _ = clusters(ROWS, 2)
    queries, _ = clusters(QUERIES, 3)
    print(f"bank {bank.nbytes / 2**20:.0f} MiB, queries {queries.nbytes / 2**20:.0f} MiB, k = {K}")
    cases = [(2048, ROWS), (QUERIES, 33_000)] + [(QUERIES, ROWS)] * full
    most = 0
    for count, rows in cases:
        began = time.perf_counter()
        more = held(queries[:count], bank[:rows], "l2")
        most += more
        bound = bytes_held(count, DIM, K, bank.device) + 17 * rows  # of the rows their numbers
        print(
            f"{count} queries, {rows} rows: at most {most / 2**20:.0f} MiB beside them, "
            f"bound {bound / 2**20:.0f} MiB, {time.perf_counter() - began:.0f} s"
        )
    print(f"of 4 GiB: {most / 2**32:.3f}")


def plain(queries: Tensor, bank: Tensor) -> Tensor:
    """The loop that is written by hand."""
    return torch.cat(
        [torch.cdist(q, bank).topk(K, largest=False).indices for q in queries.split(256)]
    )


def ours(queries: Tensor, bank: Tensor) -> Tensor:
    return nearest(queries, bank, k=K, metric="l2").numbers


def plain_cosine(queries: Tensor, bank: Tensor) -> Tensor:
    bank = torch.nn.functional.normalize(bank)
    unit = torch.nn.functional.normalize(queries)
    return torch.cat([(q @ bank.mT).topk(K).indices for q in unit.split(256)])


def ours_cosine(queries: Tensor, bank: Tensor) -> Tensor:
    return nearest(queries, bank, k=K, metric="cosine").numbers


def seconds(find: Callable[[Tensor, Tensor], Tensor], *rows: Tensor) -> tuple[float, Tensor]:
    began = time.perf_counter()
    found = find(*rows)
    return time.perf_counter() - began, found


def speed(rounds: int) -> None:
    """Both sides in turn; the votes of both."""
    (queries, _), (bank, y) = clusters(4000, 1), clusters(40_000, 2)
    for name, sides in {"l2": (plain, ours), "cosine": (plain_cosine, ours_cosine)}.items():
        turns = [[seconds(side, queries, bank) for side in sides] for _ in range(rounds)]
        ratios = [theirs[0] / own[0] for theirs, own in turns]
        there, here = (found for _, found in turns[-1])
        votes = [
            ballot(torch.zeros_like(n, dtype=torch.float32), y[n], ks=(1, 20, K), classes=CLASSES,
                   weights="uniform")
            for n in (there, here)
        ]  # fmt: skip
        alike = [
            (a.argmax(1) == b.argmax(1)).double().mean()
            for a, b in zip(*(v.values() for v in votes), strict=True)
        ]
        same = (there.sort(1).values == here.sort(1).values).all(1).double().mean()
        print(
            f"{name}: {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to "
            f"{max(ratios):.2f}), predictions alike {min(alike):.5f}, sets of {K} neighbours alike "
            f"{same:.5f}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["memory", "speed"])
    parser.add_argument("--full", action="store_true", help="all queries and the whole bank")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print(f"{torch.get_num_threads()} threads")
    memory(given.full) if given.what == "memory" else speed(given.rounds)
