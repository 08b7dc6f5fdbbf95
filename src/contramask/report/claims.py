"""What sentences about a study are made of: values, intervals, and what papers state.

Names of models are arbitrary and nothing here knows how a model was trained. So a statement of a
paper about two kinds of training is put as a condition: it holds if this model is of the one kind
and that of the other. Two values differ only where their 95 % intervals do not overlap.
"""

from collections.abc import Callable
from dataclasses import dataclass

from contramask.analysis.reading import Reading
from contramask.analysis.study import Study
from contramask.report.layers import last_block
from contramask.report.words import Measured, at, differences, listed, ranked

PARK = "Park et al., arXiv:2305.00729"
SHEKHAR = "Shekhar et al., arXiv:2304.13089"
VANYAN = "Vanyan et al., arXiv:2401.00463"
HUANG = "Huang et al., arXiv:2403.02233"


@dataclass(frozen=True)
class Finding:
    """What was found, in sentences, and whose question it answers.

    Attributes:
        topic: two or three words.
        text: what is found, plain text; empty where there is nothing to compare.
        numbers: what that rests on, with intervals.
        reported: what a paper states, and how this bears on it; empty if none is looked at.
        source: the paper.
    """

    topic: str
    text: str
    numbers: str = ""
    reported: str = ""
    source: str = ""


Claim = Callable[[Study], Finding | None]


def in_last_block(study: Study, name: str, *, share: bool = False) -> dict[str, Measured]:
    """model -> what it has of this reading in its last block."""
    found: dict[str, Measured] = {}
    for model, reading in study.having(name).items():
        label = last_block(reading.axes.get("layer", ()))
        value = None if label is None else at(reading, label, share=share)
        if value is not None:
            found[model] = value
    return found


def compared(found: dict[str, Measured], most: str = "highest", least: str = "lowest") -> str:
    """Who is highest and lowest for sure, and what the intervals say of all.

    Args:
        found: name -> value.
        most: what the largest is called, e.g. `farthest`.
        least: what the smallest is called.
    """
    return f"{extremes(found, most, least)}{differences(found)}".strip()


def extremes(found: dict[str, Measured], most: str, least: str) -> str:
    """`Farthest is A, nearest B. `; several share a place while their intervals overlap."""
    names = list(ranked(found))
    if len(names) < 2 or not found[names[0]].apart(found[names[-1]]):
        return ""
    top, low = ([n for n in names if not found[n].apart(found[names[i]])] for i in (0, -1))
    if set(top) & set(low):
        top, low = names[:1], names[-1:]
    verb = "is" if len(top) == 1 else "are"
    return f"{most[0].upper()}{most[1:]} {verb} {listed(top)}, {least} {listed(low)}. "


def verdict(claim: str, found: dict[str, Measured], high: str, low: str) -> str:
    """Whether the largest and the smallest value bear a statement of a paper out.

    Args:
        claim: what the paper states, a sentence.
        found: model -> value.
        high: the kind of training that has the larger value in the paper.
        low: the kind that has the smaller one.
    """
    names = list(ranked(found))
    if len(names) < 2:
        return claim
    most, least = names[0], names[-1]
    if not found[most].apart(found[least]):
        return f"{claim} These models show no such difference."
    return (
        f"{claim} This fits if {most} was trained by {high} and {least} by {low}; "
        "the other way round it contradicts."
    )


def over_layers(a: Reading, b: Reading) -> tuple[int, int, int]:
    """Of one axis, the same places in both: how many; where a is above, and below, b for sure."""
    (labels,) = a.axes.values()
    pairs = [(at(a, label), at(b, label)) for label in labels]
    both = [(x, y) for x, y in pairs if x is not None and y is not None]
    apart = [(x, y) for x, y in both if x.apart(y)]
    above = sum(x.value > y.value for x, y in apart)
    return len(both), above, len(apart) - above
