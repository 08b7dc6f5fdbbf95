"""Where a layer is drawn: a block's output at its number, the embedding before the first."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

EMBEDDING, FINAL = "embedding", "final"
_LABEL = re.compile(r"block_(\d+)(?:\.(.+))?")


def block_of(label: str) -> int | None:
    """The number of the block that a layer is in or after; None for the others."""
    found = _LABEL.fullmatch(label)
    return int(found[1]) if found else None


def inside(label: str) -> str:
    """`attn.qkv` of `block_03.attn.qkv`; empty for the block's output and for other layers."""
    found = _LABEL.fullmatch(label)
    return (found[2] or "") if found else ""


def is_output(label: str) -> bool:
    """Whether it is the output of a whole block."""
    return block_of(label) is not None and not inside(label)


def last_block(labels: Sequence[str]) -> str | None:
    """The output of the deepest block there is."""
    outputs = [label for label in labels if is_output(label)]
    return max(outputs, key=lambda label: block_of(label) or 0, default=None)


def last_place(labels: Sequence[str]) -> str | None:
    """The final features where there are some, else the output of the deepest block."""
    return FINAL if FINAL in labels else last_block(labels)


def places(labels: Sequence[str]) -> list[float]:
    """One place a label: the embedding at -1, `block_03` at 3, what is inside a block before it.

    What is inside is spread evenly, so that `block_03.mid` alone is at 2.5. What is no layer of a
    block, such as `final`, comes one after the label before it.
    """
    counts = Counter(block_of(label) for label in labels if inside(label))
    seen: Counter[int | None] = Counter()
    found: list[float] = []
    for label in labels:
        block = block_of(label)
        if block is None:
            found.append(-1.0 if label == EMBEDDING else found[-1] + 1 if found else 0.0)
        elif inside(label):
            seen[block] += 1
            found.append(block - 1 + seen[block] / (counts[block] + 1))
        else:
            found.append(float(block))
    return found


def spoken(label: str) -> str:
    """`block 3`, as a sentence says it."""
    block = block_of(label)
    if block is not None:
        return f"block {block} {inside(label)}".strip()
    return {EMBEDDING: "the embedding", FINAL: "the final norm"}.get(label, label)


def layer_axis(axes: Axes, ticks: Mapping[float, str] | None = None, most: int = 8) -> None:
    """Numbers of blocks along x, `emb` at the embedding; no more than `most` of them.

    Args:
        axes: whose x axis shows layers.
        ticks: place -> label; None: from the range that is shown, blocks at their numbers.
        most: how many numbers there is room for.
    """
    if ticks is None:
        low, high = axes.dataLim.intervalx
        ticks = {float(x): str(x) for x in range(max(0, round(low)), round(high) + 1)}
        if low < -0.75:
            ticks = {-1.0: "emb", **ticks}
    shown = thinned(ticks, most)
    axes.set_xticks(list(shown), list(shown.values()))
    axes.set_xlabel("block")


def thinned(ticks: Mapping[float, str], most: int) -> dict[float, str]:
    """Every second, third, ... block, and the embedding, so that at most `most` blocks remain."""
    numbers = [label for label in ticks.values() if label.isdecimal()]
    every = -(-len(numbers) // most) if numbers else 1
    return {
        x: label for x, label in ticks.items() if not label.isdecimal() or int(label) % every == 0
    }
