"""The whole way, images to readings, against the published notebooks' own instrumented ViT."""

import pytest
import torch

from contramask.analysis.attention import AttentionStatistics
from contramask.analysis.fourier import Fourier
from contramask.analysis.run import analyse
from contramask.models.vit import VisionTransformer


@pytest.fixture(scope="module")
def stored(parity):
    return parity("attention_fourier")["vit"]


@pytest.fixture(scope="module")
def found(stored):
    sizes = {"embed_dim": 48, "depth": 3, "num_heads": 3}
    vit = VisionTransformer("vit_tiny_patch16_224", img_size=64, patch_size=8, timm=sizes)
    state = {k: v for k, v in stored["state_dict"].items() if not k.startswith("head")}
    vit.vit.load_state_dict(state, strict=True)
    # Two batches: means over images are of the whole.
    batches = [stored["x"][:3], stored["x"][3:]]
    return analyse(vit, batches, {"a": AttentionStatistics(), "f": Fourier()}).readings


def test_attention(stored, found):
    for name, expected in (("distance", stored["distance"]), ("nmi", stored["nmi"])):
        torch.testing.assert_close(
            found[f"attn/{name}"].value,
            torch.tensor(expected, dtype=torch.float64),
            rtol=1e-5,
            atol=1e-5,
        )


def test_frequencies(stored, found):
    profile = found["fourier/log_amplitude"]
    expected = stored["fourier"].double()
    torch.testing.assert_close(profile.value, expected, rtol=1e-5, atol=1e-5)
    assert profile.axes["layer"][:4] == ("embedding", "block_00.mid", "block_00", "block_01.mid")
    torch.testing.assert_close(
        found["fourier/high"].value,
        stored["plotted_delta_log_amp"].double(),
        rtol=1e-5,
        atol=1e-5,
    )
    assert found["fourier/high"].axes["layer"] == ("embedding", "block_00", "block_01", "block_02")
