"""Frequencies of tokens by depth: Park et al., 2023 (arXiv:2305.00729), figure 8."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from contramask.analysis.analysis import Analysis, Seen, Tap
from contramask.analysis.reading import Reading
from contramask.functional.spectra import log_amplitudes
from contramask.types import Spec, UserError


class Fourier(Analysis):
    """Log amplitude of patch tokens by frequency, relative to frequency 0, by depth.

    Read where the paper reads it: the embedding with positions, then after the attention and after
    the MLP of every block, before the final norm. Frequencies are along the diagonal.

    Args:
        images: the most images that are looked at.
        replicates: see `Analysis`.
    """

    def __init__(self, *, images: int | None = None, replicates: int = 0):
        super().__init__(replicates=replicates)
        self.images = images
        self._frequencies: tuple[str, ...] = ()

    def taps(self, spec: Spec) -> Mapping[str, Tap]:
        if min(spec.grid) < 3:
            raise UserError(
                f"analysis: fourier needs at least 3 x 3 patches, images have {spec.grid}; give "
                "larger images, or leave fourier out of --analyses"
            )

        def shrink(tokens: Float[Tensor, "B T D"], label: str) -> Float[Tensor, "B F"]:
            prefix = tokens.shape[1] - spec.patches
            return log_amplitudes(tokens[:, prefix:].float(), spec.grid)

        count = (min(spec.grid) + 1) // 2
        self._frequencies = tuple(f"{2 * i / min(spec.grid):.2f}" for i in range(count))
        return {
            "embedding": Tap("input", "blocks.0", shrink),
            "middle": Tap("input", "blocks.*.norm2", shrink),
            "output": Tap("output", "blocks.*", shrink),
        }

    def update(self, seen: Seen) -> None:
        parts = [self.stacked(seen, tap) for tap in ("embedding", "middle", "output")]
        self.add_means("sums", torch.cat(parts, 1), seen.weights)

    def readings(self) -> list[Reading]:
        tables = self.means("sums")  # (1 + 2 depth, F)
        blocks = self.layers["output"]
        depth = len(blocks)
        # Depth first: the embedding, then each block's middle and end.
        order = [0, *(i for d in range(depth) for i in (1 + d, 1 + depth + d))]
        layers = ("embedding", *(name for b in blocks for name in (f"{b}.mid", b)))
        value, low, high = (None if t is None else t[order] for t in tables)
        assert value is not None
        about = "log amplitude of patch tokens relative to frequency 0 (arXiv:2305.00729)"
        axes = {"layer": layers, "frequency": self._frequencies}
        profile = Reading("fourier/log_amplitude", axes, value, "", about, low, high)
        value, low, high = (None if t is None else t[::2, -1] for t in (value, low, high))
        assert value is not None
        about = f"log amplitude at {self._frequencies[-1]} pi relative to 0 (arXiv:2305.00729)"
        axes = {"layer": ("embedding", *blocks)}
        return [profile, Reading("fourier/high", axes, value, "", about, low, high)]
