"""What a k-NN evaluation hands out: values, the table, one sentence and the protocol."""

from collections.abc import Mapping, Sequence
from typing import Any

from contramask.probes.knn_plan import TablePlan


def result_of(
    plan: TablePlan, finished: Sequence[Mapping[str, Any]], *, bank: int, about: str
) -> dict[str, Any]:
    """The result as it is written.

    Args:
        plan: what was wanted.
        finished: of every cleaning what `Scores.finished` says, in the order of the plan.
        bank: how many train images.
        about: feature and transform, for the protocol.

    Returns:
        `values`: of the first metric and cleaning. `table`: rows of metric, cleaning, k, top1 and
        top5. `variance_share`: m -> the share of the train features' variance in the m channels
        that vary most. `widths`: cleaning -> how many channels are left. `finding`: one sentence.
        `notes`: what was skipped. `peak_bytes`: a bound of what the search held beside features,
        the largest of all cleanings. `protocol`.
    """
    table = [row for part in finished for row in part["rows"]]
    images = finished[0]["images"]
    shares = {m: share for part in finished for m, share in part["variance_share"].items()}
    cleanings = [row["cleaning"] for part in finished for row in part["rows"][:1]]
    peak = max(part["peak_bytes"] for part in finished)
    split = "train images as queries" if plan.leave_one_out else "val images"
    return {
        "values": values_of(table, images),
        "table": table,
        "variance_share": {m: shares[m] for m in sorted(shares, key=int)},
        "widths": {c: part["width"] for c, part in zip(cleanings, finished, strict=True)},
        "finding": finding(table),
        "notes": plan.notes(bank),
        "peak_bytes": peak,
        "protocol": plan.protocol(
            bank, about, f"{images} {split}; at most {peak / 2**20:.0f} MiB a rank beside features"
        ),
    }


def values_of(table: Sequence[Mapping[str, Any]], images: int) -> dict[str, float]:
    """`k20_top1`, ... of the first metric and cleaning of a table, and how many images."""
    first = [r for r in table if (r["metric"], r["cleaning"]) == _cell(table[0])]
    found = {f"k{r['k']}_{t}": r[t] for r in first for t in ("top1", "top5") if r[t] is not None}
    return {**found, "images": images}


def finding(table: Sequence[Mapping[str, Any]]) -> str | None:
    """One sentence: what cleaning does for 1-NN by inner product and for 20-NN by cosine.

    None where neither was computed, raw and with another cleaning.
    """
    told = []
    for metric, k, name in (("dot", 1, "1-NN by inner product"), ("cosine", 20, "cosine 20-NN")):
        cells = {
            r["cleaning"]: 100 * r["top1"] for r in table if (r["metric"], r["k"]) == (metric, k)
        }
        raw = cells.pop("raw", None)
        if raw is None or not cells:
            continue
        best = max(cells, key=lambda word: cells[word])
        told.append(
            f"{name} is {raw:.2f} % raw and {cells[best]:.2f} % with {best}, the best cleaning "
            f"({cells[best] - raw:+.2f} points)"
        )
    return "; ".join(told) + "." if told else None


def _cell(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["metric"], row["cleaning"]
