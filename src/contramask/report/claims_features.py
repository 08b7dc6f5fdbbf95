"""What features are like: a few channels of high variance, rank, invariance."""

from collections.abc import Mapping

from contramask.analysis.study import Study
from contramask.report.claims import SHEKHAR, VANYAN, Finding, compared, in_last_block
from contramask.report.claims_classes import FEATURES, final
from contramask.report.layers import last_place
from contramask.report.words import Measured, at, listed, number, ranked, values

CONCENTRATED = 3  # times an even share, from which on ten channels are called dominant


def channels(study: Study) -> Finding | None:
    """How much of the variance of patch tokens ten channels hold."""
    found = in_last_block(study, "repr/variance_top10", share=True)
    if not found:
        return None
    dims = {m: int(study.models[m]["dim"]) for m in found if study.models[m].get("dim")}
    even = {m: min(1.0, 10 / dim) for m, dim in dims.items()}
    many = [m for m, share in even.items() if found[m].value >= CONCENTRATED * share]
    text = f"{compared(found, 'most concentrated in ten channels', 'least')} "
    if many:
        text += (
            f"{listed(many)}: at least {CONCENTRATED} times an even share, so distances and CKA "
            "of raw features see little else; hold them against standardised channels. "
        )
    elif even:
        text += f"None has {CONCENTRATED} times an even share. "
    numbers = f"Share of variance in the ten largest channels, last block: {values(found)}"
    if len(set(even.values())) == 1:
        numbers += f"; an even share: {number(100 * next(iter(even.values())))} %"
    numbers = f"{numbers}. {_distances(study)}".strip()
    claim = "For MAE such channels are reported to spoil nearest neighbours, not linear probes."
    return Finding("Channels of high variance", text.strip(), numbers, claim, VANYAN)


def _distances(study: Study) -> str:
    """k-NN beside ridge regression on the mean of patches: what distances miss."""
    said: list[str] = []
    for model in study.having("repr/variance_top10"):
        near, linear = (final(study, f"class/{n}", model).get("mean") for n in ("knn", "ridge"))
        if near is not None and linear is not None:
            said.append(f"{model}: {near} and {linear}")
    return f"k-NN and ridge regression on the mean of patches: {'; '.join(said)}." if said else ""


def rank(study: Study) -> Finding | None:
    """RankMe of the final features, beside the number of channels."""
    found = {m: v for m, r in study.having("repr/rankme").items() if (v := at(r)) is not None}
    if not found:
        return None
    dims = {m: study.models[m].get("dim") for m in found}
    same = len(set(dims.values())) == 1 and None not in dims.values()
    of = f" of {next(iter(dims.values()))} channels" if same else ""
    numbers = f"RankMe of final features{of}: {values(found)}."
    paper = "Garrido et al., arXiv:2210.02885"
    return Finding("Rank", compared(found), numbers, "A higher rank is reported to go with better "
                   "linear probes among models of one training method.", paper)  # fmt: skip


def invariance(study: Study) -> Finding | None:
    """Cosines of an image and its flip or crop, against those of two images."""
    said: list[str] = []
    numbers: list[str] = []
    for name, kind in (("flip", "a flip"), ("crop", "another crop")):
        found = {m: v for m in study.models if (v := _against(study, name, m)) is not None}
        if not found:
            continue
        below = [m for m, (raw, base) in found.items() if not _above(raw, base)]
        if below:
            said.append(f"To {kind}, not for sure more alike than two images: {listed(below)}.")
        shares = _shares(found)
        said.append(_order(kind, found, shares))
        each = (f"{m}: {r}, {b}, {number(shares[m])}" for m, (r, b) in found.items())
        numbers.append(
            f"Cosine of an image and {kind}, of two images, and how far the first is from the "
            f"second to 1: {'; '.join(each)}."
        )
    if not numbers:
        return None
    claim = (
        "MAE's class token is reported to have the highest cosine of an image and its flip, but "
        "also of any two images: the cosine alone says little."
    )
    text = " ".join(filter(None, said))
    return Finding("Invariance", text, " ".join(numbers), claim, SHEKHAR)


def _above(raw: Measured, base: Measured) -> bool:
    return raw.apart(base) and raw.value > base.value


def _against(study: Study, name: str, model: str) -> tuple[Measured, Measured] | None:
    """The cosine and its baseline, of final features; the class token where there is one."""
    raw, base = (study.get(f"invariance/{n}", model) for n in (name, f"{name}_shuffled"))
    if raw is None or base is None:
        return None
    place = last_place(raw.axes["layer"]) or ""
    for feature in FEATURES:
        pair = at(raw, feature, place), at(base, feature, place)
        if pair[0] is not None and pair[1] is not None:
            return pair[0], pair[1]
    return None


def _shares(found: Mapping[str, tuple[Measured, Measured]]) -> dict[str, float]:
    """(cosine - baseline) / (1 - baseline): 1 if nothing changes, 0 if all images are as alike."""
    return {
        m: (raw.value - base.value) / max(1 - base.value, 1e-9) for m, (raw, base) in found.items()
    }


def _order(
    kind: str, found: Mapping[str, tuple[Measured, Measured]], shares: Mapping[str, float]
) -> str:
    """Whether the cosine and what it is beyond the baseline have the same model first."""
    if len(found) < 2:
        return ""
    by_cosine = next(iter(ranked({m: raw for m, (raw, _) in found.items()})))
    by_share = max(shares, key=shares.__getitem__)
    if by_cosine == by_share:
        return f"To {kind}, {by_share} is highest, by the cosine and beyond the baseline."
    return (
        f"To {kind}, {by_cosine} is highest by the cosine, but {by_share} by what the cosine has "
        "beyond the baseline."
    )


CLAIMS = (channels, rank, invariance)
