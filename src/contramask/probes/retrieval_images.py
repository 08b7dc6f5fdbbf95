"""Retrieval of images of the same class, and of the originals of distorted copies."""

import torch
from torch import Tensor

from contramask.distributed import total
from contramask.functional.cleaning import Cleaning
from contramask.functional.retrieval import (
    Metric,
    find_originals,
    micro_average_precision,
    retrieve,
    wrong_pairs_above,
)
from contramask.probes.extraction import gather_rows
from contramask.probes.retrieval import CHUNK, Reader, Space, Stock, Values, everywhere, rounded
from contramask.probes.retrieval_distortions import DISTORTIONS, distort
from contramask.types import UserError

KS = (1, 5, 10)

# How often a feature of the database is held at most: as read, by fingerprints, cleaned, as a bank.
COPIES_HELD = 4


def retrieve_images(
    queries: Stock, database: Stock, *, cleaning: Cleaning, metric: Metric
) -> Values:
    """Mean average precision and recall of images of the query's class, over all ranks.

    Images without a label take no part, and what has the very pixels of the query is left out of
    its ranking; so the same stock twice means leave-one-out.

    Every rank holds the features of the whole database, N images of F floats: beside some GiB for
    scores at most `COPIES_HELD` x 4 N F bytes at once while they are cleaned, the rank's own part
    of them included, and half of that from then on.

    Args:
        queries: this rank's, with features.
        database: this rank's, with features.
        cleaning: fitted on the database.
        metric: of the ranking.

    Returns:
        `map`; `at_r_map` (mAP@R); `recall1_rate` and so on, the share of queries with an image of
        their class among the first 1, 5, 10; `queries`; `queries_without_relevant`, left out of all
        means; `database`, its images; `chance_recall1_rate`. Without a query or an image in the
        database, or where no query has anything to find, the counts alone.
    """
    device = database.reader.device
    ids, x, y = _labelled(database)
    mine = queries.labels >= 0
    sums = torch.zeros(5 + len(KS), dtype=torch.float64, device=device)
    sums[0] = mine.sum()
    if len(ids):
        space = Space(x, cleaning, metric)
        del x  # as large as the bank, which takes its place
        own = queries.ids[mine]
        found = retrieve(
            space(queries.x[mine]), space.bank, (queries.labels[mine], y), (own, ids), metric=metric
        )
        there = found.relevant > 0
        size = len(ids) - torch.isin(own, ids).long()
        measures = [
            there,
            found.average_precision,
            found.precision_at_r,
            *((found.first <= k) & there for k in KS),
            found.relevant / size.clamp(min=1),
        ]
        sums[1:] = torch.stack([m.double().sum() for m in measures])
    count, able, *means = total(sums).tolist()
    values: Values = {"queries": int(able), "database": len(ids)}
    values["queries_without_relevant"] = int(count - able)
    if able:
        names = ["map", "at_r_map", *(f"recall{k}_rate" for k in KS), "chance_recall1_rate"]
        values |= dict(zip(names, rounded(means, able), strict=True))
    return values


def _labelled(database: Stock) -> tuple[Tensor, Tensor, Tensor]:
    """Fingerprints, features and labels of all ranks' labelled images."""
    known = database.labels >= 0
    rows = (database.x[known], database.labels[known])
    ids, (x, y) = everywhere(database.ids[known], *rows, via=database.reader.device)
    return ids, x, y


def detect_copies(
    reader: Reader,
    originals: Stock,
    distractors: Stock,
    *,
    copies: int = 4,
    cleaning: Cleaning,
    metric: Metric,
    seed: int = 0,
) -> Values:
    """Find the original of every distorted copy among originals and distractors, over all ranks.

    Distractors with the very pixels of an original are left out. One relevant image each makes the
    mean average precision the mean of 1 / rank.

    Args:
        reader: of features.
        originals: this rank's, with pixels.
        distractors: this rank's, with features.
        copies: of each original; see `distort`.
        cleaning: fitted on the database, which is originals and distractors.
        metric: of the ranking.
        seed: of the distortions.

    Returns:
        `map`; `micro_map`, of one ranking of all pairs (`micro_average_precision`);
        `recall1_rate`; `blur_recall1_rate` and so on, of the copies with that distortion;
        `queries`, `database`, `chance_recall1_rate`.

    Raises:
        UserError: for a database of fewer than two images.
    """
    ids, x = _searched(reader, originals, distractors)
    space = Space(x, cleaning, metric)
    del x  # as large as the bank, which takes its place
    queries, kinds, own = _read_copies(reader, originals, copies, seed)
    targets = torch.searchsorted(ids, own)
    arguments = (space(queries), space.bank, targets)
    right, ranks = find_originals(*arguments, metric=metric)
    thresholds = gather_rows(right, via=reader.device).sort().values
    above = total(wrong_pairs_above(thresholds, *arguments, metric=metric))
    return _copy_values(ranks, kinds, above, len(space.bank))


def _searched(reader: Reader, originals: Stock, distractors: Stock) -> tuple[Tensor, Tensor]:
    """Fingerprints of all originals, and features of them and, behind them, of all distractors."""
    device = reader.device
    width = reader.feature.width(reader.backbone.spec)
    read = [torch.empty((0, width), device=device)]
    read += [reader.images(part.float() / 255) for part, _, _ in originals.chunks()]
    ids, (x,) = everywhere(originals.ids, torch.cat(read), via=device)
    others, (y,) = everywhere(distractors.ids, distractors.x, via=device)
    y = y[~torch.isin(others, ids)]
    if not len(ids) or len(ids) + len(y) < 2:
        raise UserError(
            f"retrieval: {len(ids)} originals and {len(y)} distractors; copies need an original "
            "and another image; give more in data.val and data.train"
        )
    return ids, torch.cat([x, y])


def _read_copies(
    reader: Reader, originals: Stock, copies: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Features, which distortions each has (Q, kinds), and the fingerprint of its original."""
    names, device = list(DISTORTIONS), reader.device
    width = reader.feature.width(reader.backbone.spec)
    x, kinds, own = [torch.empty((0, width), device=device)], list[list[bool]](), list[Tensor]()
    for part, keys, here in originals.chunks():
        made = [
            distort(image, key=key, copy=copy, seed=seed)
            for image, key in zip(part, keys, strict=True)
            for copy in range(copies)
        ]
        images = torch.stack([image for image, _ in made])
        x += [reader.images(some.float() / 255) for some in images.split(CHUNK)]
        kinds += [[name in applied for name in names] for _, applied in made]
        own.append(originals.ids[here].repeat_interleave(copies))
    table = torch.tensor(kinds, dtype=torch.bool, device=device).view(-1, len(names))
    return torch.cat(x), table, torch.cat([originals.ids[:0], *own])


def _copy_values(ranks: Tensor, kinds: Tensor, above: Tensor, database: int) -> Values:
    first = (ranks == 1).double()
    plain = torch.stack([1 / ranks.double(), first]).sum(1)
    by_kind = torch.stack([kinds.double().sum(0), (kinds * first[:, None]).sum(0)])
    mean_rank, found = rounded(total(plain).tolist(), len(above))
    counts, hits = total(by_kind).tolist()
    values: Values = {"queries": len(above), "database": database, "map": mean_rank}
    values["micro_map"] = rounded([micro_average_precision(above).item()], 1)[0]
    values["recall1_rate"] = found
    values["chance_recall1_rate"] = round(1 / database, 9)
    for name, hit, count in zip(DISTORTIONS, hits, counts, strict=True):
        if count:
            values[f"{name}_recall1_rate"] = rounded([hit], count)[0]
    return values
