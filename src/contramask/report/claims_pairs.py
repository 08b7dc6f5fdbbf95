"""What Shekhar et al. (arXiv:2304.13089) state of pairs of models, looked for in this study."""

import itertools
import re
from collections.abc import Mapping, Sequence

from contramask.analysis.reading import Reading
from contramask.analysis.study import Study
from contramask.report.claims import SHEKHAR, Finding, compared
from contramask.report.words import Measured, at, listed, number, ranked, values

Pair = tuple[str, str]
ATTENTION_SIDE, MLP_SIDE = ("norm1", "qkv"), ("norm2", "fc1")
POOLS, CLEANINGS = ("flat", "mean", "cls"), ("raw", "standardised")  # known; there may be others


def different(study: Study, name: str) -> dict[Pair, Reading]:
    """The reading of every pair of two models, not of a model with itself."""
    found = {(a, b): study.get(name, a, b) for a, b in study.pairs() if a != b}
    return {pair: reading for pair, reading in found.items() if reading is not None}


def called(pair: Pair) -> str:
    """`A \u2013 B`."""
    return " \u2013 ".join(pair)


def of_pairs(study: Study, name: str, *, share: bool = False) -> dict[str, Measured]:
    """`A \u2013 B` -> a reading without axes."""
    found = {called(p): at(r, share=share) for p, r in different(study, name).items()}
    return {pair: value for pair, value in found.items() if value is not None}


def ways(study: Study) -> dict[str, list[str]]:
    """pooling -> cleanings of which pairs have CKA; the papers' own, all tokens raw, first."""
    names = {name for who in study.pairs() for name in study.readings[who]}
    found = [name.split("/")[1:] for name in names if re.fullmatch("cka/[^/]+/[^/]+", name)]
    order = [*POOLS, *CLEANINGS]
    found.sort(key=lambda way: [(order.index(x) if x in order else 99, x) for x in way])
    table: dict[str, list[str]] = {}
    for pool, cleaning in found:
        table.setdefault(pool, []).append(cleaning)
    return table


def pool_of(study: Study) -> str | None:
    """The pooling that findings are about: the first."""
    return next(iter(ways(study)), None)


def similarity(study: Study) -> Finding | None:
    """CKA of layers at the same depth, of all pairs."""
    pool = pool_of(study)
    found = of_pairs(study, f"cka/{pool}/raw/same_depth_mean")
    if not found:
        return None
    text = compared(found, "nearest", "farthest")
    numbers = f"Mean CKA of layers at the same depth: {values(found)}."
    paper = (
        "Two joint-embedding models are reported at about 0.7, one of them and MAE at about 0.45 "
        "(ViT-B, ImageNet). Other sizes and data need not give such values; the order may hold."
    )
    return Finding("Similarity", text, numbers, paper, SHEKHAR)


def sublayers(study: Study) -> Finding | None:
    """Which parts of the blocks differ most, and whether it is what stands before attention."""
    said: list[str] = []
    lower: dict[bool, list[str]] = {}
    for pair, reading in different(study, f"cka/{pool_of(study)}/raw/same_depth").items():
        means = {place[0]: value for place, value in reading.mean("layer").items()}
        if len(means) < 2:
            continue
        low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
        text = f"{called(pair)}: {low} {number(means[low])}, {high} {number(means[high])}"
        sides = side(means, ATTENTION_SIDE), side(means, MLP_SIDE)
        if sides[0] is not None and sides[1] is not None:
            lower.setdefault(sides[0] < sides[1], []).append(called(pair))
            text += f", norm1 and qkv {number(sides[0])}, norm2 and fc1 {number(sides[1])}"
        said.append(text)
    if not said:
        return None
    kinds = {True: "less", False: "not less"}
    texts = [
        f"norm1 and qkv are {kinds[less]} alike than norm2 and fc1 in {listed(pairs)}."
        for less, pairs in lower.items()
    ]
    claim = (
        "For joint embedding against MAE, norm1 and qkv are reported to differ most and fc1 less; "
        "norm2 is the most alike in the authors' own numbers."
    )
    numbers = f"Mean CKA over blocks, the lowest and the highest part first: {'; '.join(said)}."
    text = " ".join([*texts, "These are means without intervals."])
    return Finding("Parts of a block", text, numbers, claim, SHEKHAR)


def side(means: Mapping[str, float], parts: Sequence[str]) -> float | None:
    """The mean over sub-layers that are called so by their last word, such as `attn.qkv`."""
    found = [value for name, value in means.items() if name.rpartition(".")[2] in parts]
    return sum(found) / len(found) if found else None


def standardising(study: Study) -> Finding | None:
    """Whether a few channels of high variance made pairs look different."""
    pool = pool_of(study)
    said: list[str] = []
    changed: dict[str, list[str]] = {}
    raw, clean = (of_pairs(study, f"cka/{pool}/{c}/same_depth_mean") for c in CLEANINGS)
    for pair in [pair for pair in raw if pair in clean]:
        changed.setdefault(_change(raw[pair], clean[pair]), []).append(pair)
        said.append(f"{pair}: from {raw[pair]} to {clean[pair]}")
    if not said:
        return None
    text = " ".join(f"{kind} {listed(pairs)}." for kind, pairs in changed.items())
    orders = [list(ranked({p: x[p] for p in raw if p in clean})) for x in (raw, clean)]
    if len(said) > 1:
        text += f" The order of pairs {'stays' if orders[0] == orders[1] else 'changes'}."
    numbers = f"Mean CKA, raw and with every channel standardised: {'; '.join(said)}. "
    numbers += _gaps(study, str(pool))
    return Finding("Standardised channels", text, numbers.strip())


def _change(raw: Measured, clean: Measured) -> str:
    """What standardising does to the mean CKA of a pair, the beginning of a sentence."""
    if not (raw.sure and clean.sure):
        return "There are no intervals to say what standardising channels changes in"
    if not raw.apart(clean):
        return "With standardised channels the intervals overlap those of raw ones in"
    return f"Standardising channels {'raises' if clean.value > raw.value else 'lowers'} CKA of"


def _gaps(study: Study, pool: str) -> str:
    """The step from norm1 and qkv to norm2 and fc1, before and after standardising."""
    raw, clean = (different(study, f"cka/{pool}/{c}/same_depth") for c in CLEANINGS)
    said = []
    for pair in raw:
        steps = [_gap(table[pair]) for table in (raw, clean) if pair in table]
        if len(steps) == 2 and steps[0] is not None and steps[1] is not None:
            said.append(f"{called(pair)}: from {number(steps[0])} to {number(steps[1])}")
    what = "By how much norm1 and qkv are lower than norm2 and fc1"
    return f"{what}: {'; '.join(said)}." if said else ""


def _gap(reading: Reading) -> float | None:
    means = {place[0]: value for place, value in reading.mean("layer").items()}
    low, high = side(means, ATTENTION_SIDE), side(means, MLP_SIDE)
    return None if low is None or high is None else high - low


def agreement(study: Study) -> Finding | None:
    """How often pairs predict the same, and whether CKA orders pairs likewise."""
    found = of_pairs(study, "agree/top1", share=True)
    if not found:
        return None
    text = f"{compared(found, 'most alike in predictions', 'least')} "
    numbers = f"Images for which both predict the same class: {values(found)}."
    near = of_pairs(study, f"cka/{pool_of(study)}/raw/same_depth_mean")
    both = [pair for pair in ranked(found) if pair in near]
    if len(both) > 1:
        steps = itertools.pairwise(near[pair].value for pair in both)
        alike = all(a >= b for a, b in steps)
        text += f"CKA orders the pairs {'alike' if alike else 'otherwise'}. "
    tau = of_pairs(study, "agree/tau")
    if tau:
        text += compared(tau, "highest by Kendall's tau", "lowest")
        numbers += f" Kendall's tau of their predictions: {values(tau)}."
    return Finding("Agreement", text.strip(), numbers)


CLAIMS = (similarity, sublayers, standardising, agreement)
