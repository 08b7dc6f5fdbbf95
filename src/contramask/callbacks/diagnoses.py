"""Rules by which numbers of a training become diagnoses. Pure: a history in, findings out.

Every rule has two thresholds with a gap between them, and what must be seen is far from what
healthy runs show: a false alarm is worse than a late one. What is "nothing learned" is a closed
form or is measured: the loss of equal similarities, the entropy of uniform codes, the spread of
targets.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from statistics import median

from contramask.callbacks import advice
from contramask.callbacks.history import Finding, History, Rule

# The watchdog's own numbers; the others are logged by who trains or analyses.
STD, RANK, CHANCE = "watchdog/std", "watchdog/effective_rank", "watchdog/chance"
GRADIENT, NMI = "optim/grad_norm", "attn/nmi/block_"
RANKME, FEATURE_STD = "repr/rankme", "repr/std"


@dataclass(frozen=True)
class Codes:
    """A term that sorts images by a teacher's prototypes."""

    prototypes: int
    images: int  # codes that the mean code is of
    loss: str  # the key of the cross-entropy between teacher and student


@dataclass(frozen=True)
class Facts:
    """What the rules must know of a run beside its numbers; terms of the loss by name."""

    width: int  # of features
    images: int  # of a rank, whose features are measured
    contrasts: Mapping[str, float] = field(default_factory=dict)  # loss of equal similarities
    words: Mapping[str, float] = field(default_factory=dict)  # loss of equally likely words
    codes: Mapping[str, Codes] = field(default_factory=dict)
    targets: tuple[str, ...] = ()  # terms with a teacher's tokens as targets, of known `spread`
    masked: tuple[str, ...] = ()  # terms whose loss of a constant prediction is measured


def rules(facts: Facts) -> list[Rule]:
    """All rules that apply to a run."""
    made = [
        Rule("uniform_collapse", partial(uniform, facts=facts), *advice.UNIFORM),
        Rule("dimensional_collapse", partial(dimensional, facts=facts), *advice.DIMENSIONAL),
        Rule("gradient_spikes", spikes, *advice.SPIKES, kind="warning", patience=1, early=True),
        Rule("attention_collapse", attention, *advice.ATTENTION, kind="remark"),
    ]
    for k, chance in facts.contrasts.items():
        judge = partial(at_chance, name=k, chance=chance)
        made.append(Rule(f"{k}/at_chance", judge, *advice.CHANCE_OF_PAIRS))
    for k, chance in facts.words.items():
        judge = partial(at_chance, name=k, chance=chance)
        made.append(Rule(f"{k}/at_chance", judge, *advice.CHANCE_OF_WORDS))
    for k, codes in facts.codes.items():
        one, same = (partial(rule, name=k, codes=codes) for rule in (one_prototype, same_codes))
        made.append(Rule(f"{k}/one_prototype", one, *advice.ONE_PROTOTYPE))
        made.append(Rule(f"{k}/same_codes", same, *advice.SAME_CODES))
    for k in facts.targets:
        judge = partial(constant_targets, name=k)
        made.append(Rule(f"{k}/constant_targets", judge, *advice.CONSTANT_TARGETS))
    for k in facts.masked:
        judge = partial(predicts_mean, name=k)
        made.append(Rule(f"{k}/predicts_mean", judge, *advice.PREDICTS_MEAN))
    return made


def _finding(seen: str, *, bad: bool, good: bool) -> Finding:
    return Finding(True if bad else False if good else None, seen)


def uniform(history: History, *, facts: Facts) -> Finding:
    """The standard deviation of unit features against 1 / sqrt(width), as in SimSiam's figure 2.

    That figure is of what a loss reads, after a batch norm. A backbone's features have a common
    part that the norm takes away: with MoCo v3 their deviation falls to 0.2 and less while they get
    better. So far less than that is asked for, less than half of what it once was, and that no
    contrast or teacher tells images apart all the same.
    """
    value, peak = history.last(STD), history.peak(STD)
    if value is None or peak is None:
        return Finding()
    told = any(
        finding.shown is False
        for finding in (
            *(at_chance(history, name=k, chance=c) for k, c in facts.contrasts.items()),
            *(same_codes(history, name=k, codes=c) for k, c in facts.codes.items()),
        )
    )
    beside = [f", {key} {history.last(key):.3g}" for key in history.keys(FEATURE_STD)[-1:]]
    seen = (
        f"the deviation of unit features is {value:.3g} of 1/sqrt({facts.width}), that of features "
        f"in all directions, and was {peak:.3g} at most{''.join(beside)}"
    )
    bad = value < 0.03 and value < max(peak / 2, 0.005) and not told
    return _finding(seen, bad=bad, good=value > 0.06)


def dimensional(history: History, *, facts: Facts) -> Finding:
    """The effective rank against what is possible, and against what it was."""
    tops = {RANK: min(facts.images - 1, facts.width), RANKME: facts.width}
    known = [(k, v, top) for k, top in tops.items() if (v := history.last(k)) is not None]
    if not known or uniform(history, facts=facts).shown:  # the rank of a point is noise
        return Finding()
    found = []
    for key, value, top in known:
        peak = history.peak(key) or value
        seen = f"the effective rank of features ({key}) is {value:.1f} of at most {top}"
        bad = value < 0.05 * top and value < peak / 2
        good = value > 0.1 * top or value > 0.75 * peak
        found.append(_finding(f"{seen}, and was {peak:.1f}", bad=bad, good=good))
    return next((f for f in found if f.shown), next((f for f in found if not f.shown), found[0]))


def _resting(history: History, name: str) -> bool:
    """A term of weight 0 is computed and not learned."""
    return history.last(f"train/weight/{name}") == 0


def at_chance(history: History, *, name: str, chance: float) -> Finding:
    """A cross-entropy against that of equal scores: ln K, with the term's own factor."""
    loss = history.mean(f"train/loss/{name}")
    if loss is None or _resting(history, name):
        return Finding()
    seen = f"the loss of {name!r} is {loss:.4g}; with equal scores it is {chance:.4g}"
    return _finding(seen, bad=loss > 0.98 * chance, good=loss < 0.95 * chance)


def _codes(history: History, name: str, codes: Codes) -> tuple[float, float, float] | None:
    """Entropy of an image's code, that of the mean code, and KL from teacher to student."""
    each = history.mean(f"train/{name}/target_entropy")
    mean = history.mean(f"train/{name}/code_entropy")
    loss = history.mean(codes.loss)
    if each is None or mean is None or loss is None or _resting(history, name):
        return None
    return each, mean, loss - each


def one_prototype(history: History, *, name: str, codes: Codes) -> Finding:
    """The entropy of the mean code near 0."""
    known = _codes(history, name, codes)
    if known is None:
        return Finding()
    _, mean, _ = known
    top = math.log(min(codes.prototypes, codes.images))
    seen = f"the mean code of {name!r} has entropy {mean:.3g} of ln {codes.prototypes}"
    return _finding(seen, bad=mean < 0.05 * top, good=mean > 0.15 * top)


def same_codes(history: History, *, name: str, codes: Codes) -> Finding:
    """Codes that say nothing of the image, and a student that repeats them.

    What a code says is the entropy of the mean code less the mean of their entropies.
    """
    known = _codes(history, name, codes)
    if known is None:
        return Finding()
    each, mean, divergence = known
    top, whole = math.log(min(codes.prototypes, codes.images)), math.log(codes.prototypes)
    told = mean - each
    kind = "uniform" if each > 0.95 * whole else "one fixed mixture"
    seen = (
        f"codes of {name!r} are {kind}: entropy {each:.4g} of ln {codes.prototypes} = {whole:.4g}, "
        f"{told:.2g} nats tell images apart, and the student is {divergence:.2g} nats from them"
    )
    bad = told < 0.01 * top and divergence < 0.01 * whole and mean > 0.15 * top
    return _finding(seen, bad=bad, good=told > 0.03 * top or divergence > 0.03 * whole)


def constant_targets(history: History, *, name: str) -> Finding:
    """The spread of a teacher's normalised tokens, at most 1."""
    spread = history.mean(f"train/{name}/spread")
    if spread is None or _resting(history, name):
        return Finding()
    seen = f"the teacher's tokens for {name!r} have a standard deviation of {spread:.3g}"
    return _finding(seen, bad=spread < 0.05, good=spread > 0.1)


def predicts_mean(history: History, *, name: str) -> Finding:
    """A reconstruction loss against that of the best constant prediction."""
    loss = history.mean(f"train/loss/{name}")
    chance = history.mean(f"{CHANCE}/{name}", least=1)
    if loss is None or chance is None or _resting(history, name):
        return Finding()
    seen = f"the loss of {name!r} is {loss:.4g}; that of one constant for all is {chance:.4g}"
    return _finding(seen, bad=loss > 0.99 * chance, good=loss < 0.97 * chance)


def spikes(history: History) -> Finding:
    """Gradient norms far above those before and after: peaks, and not another level.

    Of the norms with 20 before and 10 after, those above 5 times both medians and above 6 robust
    standard deviations of the logarithms before.
    """
    norms = history.values(GRADIENT)
    if len(norms) < 40 or min(norms) <= 0:
        return Finding()
    ratios = []
    for i in range(20, len(norms) - 10):
        before, after = norms[i - 20 : i], norms[i + 1 : i + 11]
        level = max(median(before), median(after))
        logs = [math.log(n) for n in before]
        middle = median(logs)
        deviation = 1.4826 * median(abs(x - middle) for x in logs)
        if norms[i] > 5 * level and math.log(norms[i]) - middle > 6 * deviation:
            ratios.append(norms[i] / level)
    number = len(norms) - 30
    seen = f"{len(ratios)} of the last {number} gradient norms looked at are spikes"
    if ratios:
        seen += f", up to {max(ratios):.3g} times their neighbours' median"
    return _finding(seen, bad=len(ratios) >= 3, good=not ratios)


def attention(history: History) -> Finding:
    """The normalised mutual information of queries and keys in the last two blocks."""
    keys = sorted(history.keys(NMI), key=lambda key: int(key.removeprefix(NMI)))
    last = [history.last(key) or 0.0 for key in keys[-2:]]
    if len(last) < 2:
        return Finding()
    value = sum(last) / 2
    seen = f"attention in the last two blocks has a normalised mutual information of {value:.2g}"
    return _finding(seen, bad=value < 0.03, good=value > 0.06)
