"""What a checkpoint remembers of its training data, so that other data is not taken for it.

The stream is a function of (seed, position) over given shards in a given order: a shard more, or
one that was packed again, and the same position is another sample.
"""

import posixpath
from typing import Any

from contramask.data.shard_set import ShardSet
from contramask.errors import UserError

_DIGITS = 16  # of a checksum; the index has it whole


def remember(shards: ShardSet, *, world: int, workers: int) -> dict[str, Any]:
    """Plain values that a checkpoint holds. Folders are left out: files may move.

    Args:
        shards: of the training stream.
        world: ranks.
        workers: of each rank; they and `world` matter only where there is no index.
    """
    names = [[posixpath.basename(url) for url in source.shards] for source in shards.sources]
    if shards.indexes is None:
        return {"names": names, "world": world, "workers": workers}
    entries = [
        [f"{shard.count} samples, sha256 {shard.sha256[:_DIGITS]}" for shard in index.shards]
        for index in shards.indexes
    ]
    return {"names": names, "entries": entries}


def check(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Hold what a checkpoint remembers against what is there.

    Raises:
        UserError: the training stream would not go on where it stopped; the first shard that
            differs is named.
    """
    if ("entries" in before) != ("entries" in now):
        had = (
            "had an index and now has none"
            if "entries" in before
            else "had no index and now has one"
        )
        raise _refusal(f"it {had}, which is another order")
    old, new = _listed(before), _listed(now)
    for i in range(max(len(old), len(new))):
        a, b = (found[i] if i < len(found) else "no shard" for found in (old, new))
        if a != b:
            raise _refusal(f"shard {i} was {a} and is {b}")
    for key, setting in (("world", "the number of ranks"), ("workers", "data.workers")):
        if before.get(key) != now.get(key):
            raise UserError(
                f"without an index the order depends on {setting}, which was {before.get(key)} and "
                f"is {now.get(key)}: the run would see other samples; set it back, or run "
                "`contramask pack index` before the next run"
            )


def _listed(state: dict[str, Any]) -> list[str]:
    """Every shard of every source, in order, in words."""
    entries = state.get("entries") or [[""] * len(names) for names in state["names"]]
    return [
        f"{name} ({entry})" if entry else name
        for names, source in zip(state["names"], entries, strict=True)
        for name, entry in zip(names, source, strict=True)
    ]


def _refusal(reason: str) -> UserError:
    return UserError(
        f"the training data is not that of the checkpoint: {reason}; the run would go on with "
        "other samples than were next. Put the shards back at data.train, or start another run "
        "with another --name"
    )
