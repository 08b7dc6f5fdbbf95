"""The analyses by name, with the settings they are usually wanted with."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast, get_args

from contramask.analysis.analysis import Analysis
from contramask.analysis.attention import AttentionStatistics
from contramask.analysis.classes import Classes
from contramask.analysis.fourier import Fourier
from contramask.analysis.geometry import Geometry, TokenSpectrum
from contramask.analysis.grams import BLOCK, SUBLAYERS, Cleaning, Grams, Pool
from contramask.analysis.invariance import Invariance
from contramask.analysis.pictures import Pictures
from contramask.types import UserError

NAMES = (
    "cka", "attention", "fourier", "geometry", "spectra", "invariance", "classes", "pictures",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How the analyses are taken.

    Attributes:
        replicates: bootstrap samples of images behind each interval; 0: no intervals.
        cka: ways to take CKA, POOL/CLEANING each: pools are flat (all tokens and channels), cls,
            mean (of patches); cleanings raw, standardised, trimmed.
        top: channels of the largest variance that `trimmed` leaves out.
        minibatch: images of a minibatch of CKA; the paper's 32.
        sublayers: of every block that CKA compares.
    """

    replicates: int = 200
    cka: Sequence[str] = ("flat/raw", "flat/standardised", "mean/raw", "cls/raw")
    top: int = 10
    minibatch: int = 32
    sublayers: tuple[str, ...] = (*SUBLAYERS, BLOCK)


def suite(names: Iterable[str] = NAMES, settings: Settings | None = None) -> dict[str, Analysis]:
    """Analyses by name; `cka` gives one entry a way, `cka/flat/raw`.

    Raises:
        UserError: for a name or a way that there is not.
    """
    s = settings or Settings()
    made = {
        "attention": lambda: AttentionStatistics(images=512, replicates=s.replicates),
        "fourier": lambda: Fourier(replicates=s.replicates),
        "geometry": Geometry,
        "spectra": lambda: TokenSpectrum(replicates=s.replicates),
        "invariance": lambda: Invariance(replicates=s.replicates),
        "classes": lambda: Classes(replicates=s.replicates),
        "pictures": Pictures,
    }
    chosen = list(names)
    for name in chosen:
        if name not in NAMES:
            raise UserError(
                f"no analysis {name!r}; there are {', '.join(NAMES)}; correct --analyses"
            )
    found: dict[str, Analysis] = {}
    for name in NAMES:  # in one order whatever is given: ranks gather one after the other
        if name == "cka" and name in chosen:
            found |= {f"cka/{way}": _grams(way, s) for way in s.cka}
        elif name in chosen:
            found[name] = made[name]()
    return found


def _grams(way: str, s: Settings) -> Grams:
    pool, _, cleaning = way.partition("/")
    if pool not in get_args(Pool) or cleaning not in get_args(Cleaning):
        raise UserError(
            f"cka: no way {way!r}; a way is POOL/CLEANING with a pool of "
            f"{', '.join(get_args(Pool))} and a cleaning of {', '.join(get_args(Cleaning))}; "
            "correct cka"
        )
    return Grams(
        pool=cast("Pool", pool),
        cleaning=cast("Cleaning", cleaning),
        top=s.top,
        sublayers=s.sublayers,
        batch=s.minibatch,
    )
