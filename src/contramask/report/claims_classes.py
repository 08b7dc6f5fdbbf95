"""How well features tell classes apart: at the end, by depth, in class token and patches."""

from contramask.analysis.reading import Reading
from contramask.analysis.study import Study
from contramask.report.claims import PARK, SHEKHAR, Finding, compared
from contramask.report.layers import block_of, is_output, last_block, last_place, spoken
from contramask.report.words import Measured, at, listed, values

FEATURES = {"cls": "class token", "mean": "mean of patches"}


def final(study: Study, name: str, model: str) -> dict[str, Measured]:
    """feature -> accuracy of a model's final features, or those of its last block."""
    reading = study.get(name, model)
    place = None if reading is None else last_place(reading.axes["layer"])
    if reading is None or place is None:
        return {}
    found = {f: at(reading, f, place, share=True) for f in reading.axes["feature"]}
    return {f: value for f, value in found.items() if value is not None}


def separability(study: Study) -> Finding | None:
    """Accuracy of each model's final features, the better of class token and patches."""
    for name, method in (("class/knn", "k-NN"), ("class/ridge", "Ridge regression")):
        found = {
            model: max(known.values(), key=lambda value: value.value)
            for model in study.having(name)
            if (known := final(study, name, model))
        }
        if found:
            what = f"{method} on final features, the better of class token and patches"
            text = compared(found, f"best by {method}", "worst")
            return Finding("Classes", text, f"{what}: {values(found)}.")
    return None


def peak(study: Study) -> Finding | None:
    """Whether the last blocks make classes harder to tell apart, as a decoder would."""
    kinds: dict[str, list[str]] = {}
    numbers: list[str] = []
    for model, reading in study.having("class/knn").items():
        kind, said = _peak(model, reading)
        if said:
            kinds.setdefault(kind, []).append(model)
            numbers.append(said)
    if not kinds:
        return None
    text = " ".join(f"{kind} {listed(models)}." for kind, models in kinds.items())
    claim = (
        "A peak before the end is reported for masked models whose last blocks do the work of a "
        "decoder, such as SimMIM, and not for contrastive ones."
    )
    return Finding("Where classes peak", text, f"k-NN: {'; '.join(numbers)}.", claim, PARK)


END = "k-NN is best in the last block of"
FALL = "It is best earlier, and falls until the last block, in"
NO_FALL = "It is highest earlier, but the interval overlaps that of the last block, in"
UNSURE = "It is highest earlier, without intervals to call it a fall, in"


def _peak(model: str, reading: Reading) -> tuple[str, str]:
    """Which of these it is, and the best block of the best feature beside the last one."""
    blocks = [label for label in reading.axes["layer"] if is_output(label)]
    features = reading.axes["feature"]
    known = {(f, b): v for f in features for b in blocks if (v := at(reading, f, b, share=True))}
    end = last_block(blocks)
    if len(blocks) < 2 or not known or end is None:
        return "", ""
    feature, best = max(known, key=lambda place: known[place].value)
    top, last = known[feature, best], known.get((feature, end))
    if last is None:
        return "", ""
    of = f"of {(block_of(end) or 0) + 1}"
    said = f"{model}, {FEATURES.get(feature, feature)}: {top} after {spoken(best)}"
    if best == end:
        return END, f"{said} {of}"
    kind = FALL if top.apart(last) else NO_FALL if top.sure and last.sure else UNSURE
    return kind, f"{said}, {last} after {spoken(end)} {of}"


def token(study: Study) -> Finding | None:
    """Class token against the mean of patches in the final features."""
    kinds: dict[str, list[str]] = {}
    numbers: list[str] = []
    for model in study.having("class/knn"):
        known = final(study, "class/knn", model)
        if set(known) != set(FEATURES):
            continue
        cls, mean = known["cls"], known["mean"]
        if cls.apart(mean):
            more = "The class token" if cls.value > mean.value else "The mean of patches"
            kind = f"{more} tells classes apart better in"
        else:
            sure = cls.sure and mean.sure
            kind = f"{'Intervals of both overlap' if sure else 'There are no intervals'} in"
        kinds.setdefault(kind, []).append(model)
        numbers.append(f"{model}: {cls} and {mean}")
    if not kinds:
        return None
    text = " ".join(f"{kind} {listed(models)}." for kind, models in kinds.items())
    said = f"k-NN on the final class token and mean of patches: {'; '.join(numbers)}."
    claim = "Joint embedding is reported to gather the class in its token; for MAE both are alike."
    return Finding("Class token and patches", text, said, claim, SHEKHAR)


CLAIMS = (separability, peak, token)
