"""What Park et al. (arXiv:2305.00729) state of attention and of frequencies, looked for here."""

import math

from contramask.analysis.study import Study
from contramask.functional.attention import pixel_distances
from contramask.report.claims import (
    HUANG,
    PARK,
    Finding,
    compared,
    in_last_block,
    over_layers,
    verdict,
)
from contramask.report.layers import block_of, is_output
from contramask.report.words import Measured, at, listed, number, ranked, values

CONTRASTIVE, MASKED = "a contrastive objective", "masked modelling"
COLLAPSE = 0.05  # an NMI below it: MoCo v3 ends at 0.01 to 0.03, and is called collapsed


def distance(study: Study) -> Finding | None:
    """How far the last block looks, against attention to all patches alike."""
    found = in_last_block(study, "attn/distance")
    if not found:
        return None
    even = {number(x): x for m in found if (x := even_distance(study, m)) is not None}
    text = f"{compared(found, 'farthest in the last block', 'nearest')} "
    text += late(study, "attn/distance", "farther")
    numbers = f"Mean distance in the last block: {values(found)}"
    if len(even) == 1:
        numbers += f". Attention to all patches alike would have {next(iter(even))} px"
    claim = "Contrastive models are reported to look farther than masked ones in late blocks."
    return Finding(
        "Attention distance",
        text.strip(),
        f"{numbers}.",
        verdict(claim, found, CONTRASTIVE, MASKED),
        PARK,
    )


def even_distance(study: Study, model: str) -> float | None:
    """Mean distance in pixels if every patch attended to all alike, as far as sizes are known."""
    known = study.models[model]
    if not known.get("grid") or not known.get("patch"):
        return None
    rows, columns = known["grid"]
    return float(pixel_distances((rows, columns), known["patch"]).mean())


def late(study: Study, name: str, more: str) -> str:
    """In how many blocks of the last third the first model of the last block is above the last."""
    names = list(ranked(in_last_block(study, name)))
    if len(names) < 2:
        return ""
    most, least = (study.having(name)[names[i]] for i in (0, -1))
    (one,), (other,) = most.axes.values(), least.axes.values()
    depth = 1 + max(block_of(label) or 0 for label in one)
    if set(one) != set(other):
        return ""
    third = [x for x in one if is_output(x) and (block_of(x) or 0) >= depth - math.ceil(depth / 3)]
    pairs = [(at(most, label), at(least, label)) for label in third]
    apart = sum(bool(a and b and a.value > b.value and a.apart(b)) for a, b in pairs)
    return f"{names[0]} is {more} than {names[-1]} in {apart} of the last {len(third)} blocks. "


def collapse(study: Study) -> Finding | None:
    """Normalised mutual information of the last block; near 0 all queries attend alike."""
    found = in_last_block(study, "attn/nmi")
    if not found:
        return None
    text = f"{compared(found, 'most dependent on the query in the last block', 'least')} "
    numbers = f"Mutual information of query and key in the last block: {values(found)}"
    low = [name for name, value in found.items() if value.value < COLLAPSE]
    if low:
        whose = "its queries" if len(low) == 1 else "their queries"
        text += f"{listed(low)}: under {COLLAPSE}, so {whose} attend nearly alike. "
    else:
        text += f"None is under {COLLAPSE}: queries still attend differently. "
    diverse = in_last_block(study, "attn/diversity")
    source = PARK
    if len(found) > 1 and set(diverse) == set(found):
        source += f"; {HUANG}"
        alike = list(ranked(diverse)) == list(ranked(found))
        text += f"The diversity of maps orders the models {'alike' if alike else 'otherwise'}. "
        numbers += f". Diversity: {values(diverse)}"
    claim = "It is reported to go to 0 in late blocks of contrastive models, not of masked ones."
    paper = verdict(claim, found, MASKED, CONTRASTIVE)
    return Finding("Collapse of attention", text.strip(), f"{numbers}.", paper, source)


def outputs(study: Study) -> Finding | None:
    """Whether heads and positions yield the same in the last block."""
    said: list[str] = []
    numbers: list[str] = []
    names = {"heads": "heads", "positions": "positions", "depths": "blocks in turn"}
    shown: dict[str, Measured] = {}
    for key, between in names.items():
        found = in_last_block(study, f"attn/output_similarity_{key}")
        if found:
            said.append(compared(found, f"most alike over {between} in the last block", "least"))
            numbers.append(f"Cosine of the outputs of two {between}: {values(found)}.")
            shown = shown or found
    if not numbers:
        return None
    claim = "Late blocks of contrastive models are reported to have the more alike outputs."
    paper = verdict(claim, shown, CONTRASTIVE, MASKED)
    text = " ".join(filter(None, said))
    return Finding("Sameness of heads and tokens", text, " ".join(numbers), paper, PARK)


def frequencies(study: Study) -> Finding | None:
    """High frequencies of the last block, and of all layers of the two that are farthest apart."""
    found = in_last_block(study, "fourier/high")
    if not found:
        return None
    text = f"{compared(found, 'richest in high frequencies in the last block', 'poorest')} "
    numbers = f"Log amplitude of the highest in the last block: {values(found)}."
    names = list(ranked(found))
    if len(names) > 1:
        most, least = (study.having("fourier/high")[names[i]] for i in (0, -1))
        layers, above, below = over_layers(most, least)
        text += (
            f"Of {layers} layers that both have, {names[0]} keeps more of high frequencies than "
            f"{names[-1]} in {above}, less in {below}. "
        )
    claim = "Contrastive models are reported to keep less of high frequencies than masked ones."
    paper = verdict(claim, found, MASKED, CONTRASTIVE)
    return Finding("Frequencies", text.strip(), numbers, paper, PARK)


CLAIMS = (distance, collapse, outputs, frequencies)
