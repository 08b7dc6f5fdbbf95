"""What flips and crops change, against what another image changes.

Cosines alone mislead: the class token of an MAE is nearly the same for all images, so its flip
cosine is the highest of all (Shekhar et al., 2023, arXiv:2304.13089). Each number therefore comes
with the same cosine to the view of another image.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from contramask.analysis.analysis import Analysis, Seen, Tap
from contramask.analysis.pooled import features_of, pooled_taps, stack
from contramask.analysis.reading import Reading
from contramask.functional.geometry import alignment, lidar, view_moments
from contramask.types import Spec, UserError

STATISTICS = {
    "invariance/flip": "cosine of an image's feature and its mirror image's (arXiv:2304.13089)",
    "invariance/flip_shuffled": "the same with the mirror image of another image: the baseline",
    "invariance/crop": "cosine of the features of two random crops of an image",
    "invariance/crop_shuffled": "the same with crops of two images: the baseline",
    "repr/alignment": "squared distance of unit features of two random crops of an image "
    "(arXiv:2005.10242)",
}


class Invariance(Analysis):
    """Cosines of features under flips and crops, alignment, and LiDAR. By depth.

    Args:
        images: the most images that are looked at; each runs 2 + `crops` times.
        crops: views of each image; LiDAR wants many (the paper takes 50), the rest two.
        replicates: see `Analysis`.
    """

    def __init__(self, *, images: int | None = 128, crops: int = 4, replicates: int = 0):
        super().__init__(replicates=replicates)
        if crops < 2:
            raise UserError(f"invariance: crops is {crops}; allowed is at least 2; set crops")
        self.images, self.crops = images, crops
        self._layers: tuple[str, ...] = ()
        self._features: tuple[str, ...] = ()

    def taps(self, spec: Spec) -> Mapping[str, Tap]:
        views = ("plain", "flip", *(f"crop_{i}" for i in range(self.crops)))
        return {k: tap for view in views for k, tap in pooled_taps(spec, view).items()}

    def update(self, seen: Seen) -> None:
        plain, self._layers = stack(seen.found)  # (B, F, L, D)
        flip = stack(seen.found, "flip")[0]
        crops = [stack(seen.found, f"crop_{i}")[0] for i in range(self.crops)]
        self._features = features_of(plain.shape[1] - 1)
        first, second = crops[:2]
        table = [
            _cosine(plain, flip),
            _cosine(plain, flip.roll(1, 0)),
            _cosine(first, second),
            _cosine(first, second.roll(1, 0)),
            alignment(first.flatten(0, 2), second.flatten(0, 2)).view(first.shape[:3]),
        ]
        if len(plain) > 1:  # one image alone has no other to be compared with
            values = torch.stack([t.double() for t in table], 1)
            self.add_means("cosines", values, seen.weights)
        final = torch.stack([crop[:, :, -1] for crop in crops], 1)  # (B, q, F, D)
        for i, name in enumerate(self._features):
            for part, moments in zip(
                ("between", "within"), view_moments(final[:, :, i]), strict=True
            ):
                self.add_moments(f"{name}_{part}", moments)

    def readings(self) -> list[Reading]:
        if "cosines" not in self._defaults:
            return []  # there were never two images to compare
        tables = self.means("cosines")
        axes = {"feature": self._features, "layer": self._layers}
        found = []
        for i, (name, about) in enumerate(STATISTICS.items()):
            value, low, high = (None if t is None else t[i] for t in tables)
            assert value is not None
            found.append(Reading(name, axes, value, "", about, low, high))
        ranks = [
            lidar(self.moments(f"{name}_between"), self.moments(f"{name}_within"))
            for name in self._features
        ]
        about = f"LiDAR of final features, {self.crops} crops of an image (arXiv:2312.04000)"
        axes = {"feature": self._features}
        return [*found, Reading("repr/lidar", axes, torch.stack(ranks), "", about)]


def _cosine(x: Float[Tensor, "B F L D"], y: Float[Tensor, "B F L D"]) -> Float[Tensor, "B F L"]:
    return (normalize(x.double(), dim=-1) * normalize(y.double(), dim=-1)).sum(-1)
