"""The paragraph "what this says": sentences computed from the readings of a study."""

from contramask.analysis.study import Study
from contramask.report import claims_attention, claims_classes, claims_features, claims_pairs
from contramask.report.claims import Finding
from contramask.report.words import listed


def findings(study: Study) -> list[Finding]:
    """All that the readings of a study support, in the order of the report's sections."""
    rooms = (claims_classes, claims_attention, claims_features, claims_pairs)
    claims = [claim for room in rooms for claim in room.CLAIMS]
    found = [claim(study) for claim in claims]
    return [finding for finding in found if finding is not None]


def caveats(study: Study) -> list[str]:
    """What the numbers cannot say, however they turn out."""
    said: list[str] = []
    if any(r.low is not None for known in study.readings.values() for r in known.values()):
        said += [
            "Intervals are of 95 % over images. Each model is one checkpoint: nothing here says "
            "how much another seed of the same training would differ.",
            "Two values are called different only where their intervals do not overlap. Intervals "
            "that overlap show no difference; they do not show that there is none.",
        ]
    unlike = [
        what
        for key, what in (("depth", "depth"), ("dim", "width"), ("grid", "grid of patches"))
        if len({str(known.get(key)) for known in study.models.values()}) > 1
    ]
    if unlike:
        said.append(
            f"The models differ in {listed(unlike)}: a difference between them need not come from "
            "how they were trained."
        )
    return said
