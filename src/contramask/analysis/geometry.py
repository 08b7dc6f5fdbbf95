"""How features fill their space: ranks, spectra, spread, and channels that hold the variance."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from contramask.analysis.analysis import Analysis, Seen, Tap
from contramask.analysis.grams import channel_moments
from contramask.analysis.pooled import features_of, pooled_taps, stack
from contramask.analysis.reading import Reading
from contramask.functional.channels import profile, top_channels, top_share
from contramask.functional.geometry import feature_std, uniformity, uniformity_sums, unit_sums
from contramask.functional.moments import Moments
from contramask.functional.spectra import FLOOR, covariance_rank, log_spectrum, token_spectrum
from contramask.types import Spec, Tokens

TOP = 10  # channels of the largest variance whose share is told
KEPT = 200  # channels of the largest variance that are named, as in arXiv:2401.00463

ABOUT = {
    "repr/rankme": "RankMe of the final feature, of the class token if there is one "
    "(arXiv:2210.02885)",
    "repr/effective_rank": "exp of the entropy of the singular values of features (RankMe, "
    "arXiv:2210.02885)",
    "repr/std": "deviation of unit features over images; 1 / sqrt(D): isotropic, 0: collapsed "
    "(arXiv:2011.10566)",
    "repr/uniformity": "log mean exp(-2 |x - y|^2) of two images' unit features (arXiv:2005.10242)",
    "repr/spectrum_image": "log singular values of the covariance of mean patch tokens over "
    "images, relative to the largest (arXiv:2305.00729)",
    "repr/channel_variance": "share of the variance of patch tokens by channel, largest first "
    "(arXiv:2401.00463)",
    "repr/variance_top10": f"share of the variance of patch tokens in the {TOP} channels that vary "
    "most (arXiv:2401.00463)",
    "repr/top_channels": "which channels of final patch tokens vary most (arXiv:2401.00463)",
}


class Geometry(Analysis):
    """Ranks, spectra, spread of image features; variance of patch tokens by channel. By depth.

    Memory: 16 D^2 bytes for each depth (a covariance of class tokens and one of means), whatever
    the number of images.

    Args:
        images: the most images that are looked at.
    """

    def __init__(self, *, images: int | None = None):
        super().__init__()
        self.images = images
        self._layers: tuple[str, ...] = ()
        self._features: tuple[str, ...] = ()

    def taps(self, spec: Spec) -> Mapping[str, Tap]:
        def block(tokens: Float[Tensor, "B T D"], label: str) -> Float[Tensor, "2 D"]:
            return moments(tokens[:, tokens.shape[1] - spec.patches :])

        def final(tokens: Tokens, label: str) -> Float[Tensor, "2 D"]:
            return moments(tokens.patch)

        # Mean and variance of each channel over the patch tokens of the batch.
        def moments(patches: Tensor) -> Float[Tensor, "2 D"]:
            return torch.stack(channel_moments(patches)).double()

        return {
            **pooled_taps(spec),
            "blocks": Tap("output", "blocks.*", block),
            "final": Tap("tokens", "*", final),
        }

    def update(self, seen: Seen) -> None:
        pooled, self._layers = stack(seen.found)  # (B, F, L, D)
        self._features = features_of(pooled.shape[1] - 1)
        rows = pooled.permute(1, 2, 0, 3)  # (F, L, B, D)
        self.add_moments("pooled", Moments.of(rows))
        for name, value in (("pairs", uniformity_sums(rows)), ("units", unit_sums(rows))):
            if name not in self._defaults:
                self.add_sum(name, torch.zeros_like(value))
            setattr(self, name, getattr(self, name) + value)
        found = {**seen.found["blocks"], **seen.found["final"]}
        mean, variance = torch.stack(list(found.values())).unbind(1)  # (L, D)
        count = mean.new_tensor(float(len(pooled)))
        # Channels one by one: their covariance is not wanted.
        scatter = (variance * count)[..., None, None]
        self.add_moments("patches", Moments(count, mean[..., None], scatter))

    def readings(self) -> list[Reading]:
        pooled, patches = self.moments("pooled"), self.moments("patches")
        depth = {"layer": self._layers}
        axes = {"feature": self._features, **depth}
        second = pooled.second_moment()
        ranks = covariance_rank(second)
        units: Tensor = self.units  # pyright: ignore[reportAssignmentType]
        pairs: Tensor = self.pairs  # pyright: ignore[reportAssignmentType]
        variance = patches.variance().squeeze(-1)  # (L, D)
        dim = variance.shape[-1]
        k = min(dim, int(pooled.count))
        spectrum = log_spectrum(pooled.covariance()[-1], k)  # of the mean of patches
        kept = top_channels(variance[-1], min(KEPT, dim // 4)).double()
        kept = kept.where(variance[-1].isfinite().all(), torch.nan)
        table = {
            "repr/rankme": ({}, ranks[0, -1]),
            "repr/effective_rank": (axes, ranks),
            "repr/std": (axes, feature_std(units)),
            "repr/uniformity": (axes, uniformity(pairs)),
            # A norm takes a direction away: its log would say how small rounding is.
            "repr/spectrum_image": (
                depth | {"index": _numbers(k)},
                spectrum.where(spectrum > math.log(2 * FLOOR), torch.nan),
            ),
            "repr/channel_variance": (depth | {"rank": _numbers(dim)}, profile(variance)),
            "repr/variance_top10": (depth, top_share(variance, min(TOP, dim))),
            "repr/top_channels": ({"rank": _numbers(len(kept))}, kept),
        }
        return [Reading(name, *entry, about=ABOUT[name]) for name, entry in table.items()]


class TokenSpectrum(Analysis):
    """Singular value spectra of the tokens of single images, by depth (arXiv:2305.00729).

    Args:
        images: the most images that are looked at; each costs a decomposition for every depth.
        replicates: see `Analysis`.
    """

    def __init__(self, *, images: int | None = 64, replicates: int = 0):
        super().__init__(replicates=replicates)
        self.images = images

    def taps(self, spec: Spec) -> Mapping[str, Tap]:
        def shrink(tokens: Float[Tensor, "B T D"], label: str) -> Float[Tensor, "B k"]:
            patches = tokens[:, tokens.shape[1] - spec.patches :]
            return token_spectrum(patches, min(spec.patches - 1, spec.dim))

        return {"blocks": Tap("output", "blocks.*", shrink)}

    def update(self, seen: Seen) -> None:
        self.add_means("spectra", self.stacked(seen, "blocks"), seen.weights)

    def readings(self) -> list[Reading]:
        value, low, high = self.means("spectra")
        axes = {"layer": self.layers["blocks"], "index": _numbers(value.shape[1])}
        about = "log singular values of the covariance of an image's tokens (arXiv:2305.00729)"
        return [Reading("repr/spectrum_token", axes, value, "", about, low, high)]


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))
