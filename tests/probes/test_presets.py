"""The official protocols of linear probing, number by number."""

from math import isclose

import pytest

from contramask.probes.features import Feature
from contramask.probes.presets import PRESETS, preset_of
from contramask.types import Spec, UserError

SMALL = Spec(dim=384, patch=16, grid=(14, 14), depth=12)
BASE = Spec(dim=768, patch=16, grid=(14, 14), depth=12)
LARGE = Spec(dim=1024, patch=16, grid=(14, 14), depth=24)

# preset: optimiser, rate at the official batch, batch, epochs, warm-up in epochs, once an epoch,
# weight decay, batch norm, train and val interpolation. Of a sweep the least and greatest rate.
TABLE = {
    "mae": ("lars", (6.4, 6.4), 16384, 90, 10, False, 0, True, "bicubic", "bicubic"),
    "mae-large": ("lars", (6.4, 6.4), 16384, 50, 10, False, 0, True, "bicubic", "bicubic"),
    "mocov3": ("sgd", (12, 12), 1024, 90, 0, True, 0, False, "bilinear", "bilinear"),
    "dino": ("sgd", (0.004, 0.004), 1024, 100, 0, True, 0, False, "bilinear", "bicubic"),
    "ibot": ("sgd", (4e-4, 36), 1024, 100, 0, True, 0, False, "bilinear", "bicubic"),
    "dinov2": ("sgd", (4e-5, 0.4), 1024, 10, 0, False, 0, False, "bicubic", "bicubic"),
    "beit": ("adamw", (4e-3, 4e-3), 1024, 100, 0, True, 1e-4, False, "bilinear", "bicubic"),
    "simmim-like": ("adamw", (4e-3, 4e-3), 1024, 100, 0, True, 1e-4, False, "bilinear", "bicubic"),
}


def test_there_is_a_row_for_every_preset():
    assert set(TABLE) == set(PRESETS)


@pytest.mark.parametrize("name", TABLE)
def test_the_numbers_of_the_official_code(name: str):
    optimiser, rates, batch, epochs, warmup, once, decay, norm, train, val = TABLE[name]
    preset = preset_of(name)
    recipe = preset.recipe
    assert (recipe.optimiser, recipe.batch, recipe.epochs) == (optimiser, batch, epochs)
    assert (recipe.per_epoch, recipe.weight_decay, recipe.batch_norm) == (once, decay, norm)
    assert (preset.train, preset.val) == (train, val)
    assert isclose(recipe.warmup * epochs, warmup)
    assert recipe.momentum == 0.9
    assert recipe.init_std == 0.01
    peak = recipe.schedule(batch).peak
    for found, expected in zip((min(recipe.rates), max(recipe.rates)), rates, strict=True):
        assert isclose(peak * found, expected)
    # DINOv2 scores its heads once, at the end; of SimMIM nothing is known.
    last = name in ("dinov2", "simmim-like")
    assert ("the best epoch on val is reported, not the last" in preset.differs) == (not last)
    on_val = name in ("ibot", "dinov2", "beit")
    assert any("chosen on val" in word for word in preset.differs) == on_val
    assert preset.source.startswith("arXiv:2")


def test_the_rates_of_the_sweeps():
    ibot, dinov2 = (preset_of(name).recipe.rates for name in ("ibot", "dinov2"))
    assert len(ibot) == 45
    assert ibot[:10] == (
        0.0001,
        0.0002,
        0.0003,
        0.0004,
        0.0005,
        0.0006,
        0.0007,
        0.0008,
        0.0009,
        1e-3,
    )
    assert ibot[-2:] == (8.0, 9.0)
    assert len(dinov2) == 13
    assert sorted(dinov2) == list(dinov2)


def test_the_rate_moves_as_in_the_official_code():
    mae, moco = preset_of("mae").recipe.schedule(16384), preset_of("mocov3").recipe.schedule(1024)
    # util/lr_sched.py of MAE: epoch / 10 of the peak, then a cosine over 80 epochs.
    assert isclose(0.1 * mae(5 / 90), 3.2)
    assert isclose(0.1 * mae(50 / 90), 3.2)
    assert isclose(0.1 * mae(30 / 90), 6.4 * 0.5 * (1 + 2**-0.5))
    # main_lincls.py of MoCo v3: 0.5 (1 + cos(pi epoch / 90)), the same for a whole epoch.
    for progress in (30 / 90, 30.5 / 90, 30.99 / 90):
        assert isclose(3 * moco(progress), 9)


@pytest.mark.parametrize(
    ("name", "spec", "expected"),
    [
        ("mae", BASE, ["last/cls/final"]),
        ("mae-large", LARGE, ["last/cls/final"]),
        ("mocov3", SMALL, ["last/cls/final"]),
        ("dino", SMALL, ["last4/cls/final"]),
        ("dino", BASE, ["last/cls+mean/final"]),
        ("ibot", SMALL, ["last4/cls/final"]),
        ("ibot", LARGE, ["last/cls+mean/final"]),
        (
            "dinov2",
            BASE,
            ["last/cls/final", "last/cls+mean/final", "last4/cls/final", "last4/cls+mean/final"],
        ),
        ("beit", BASE, [f"block_{i:02d}/cls+mean/none" for i in range(12)]),
        ("simmim-like", BASE, ["block_07/mean/none"]),
        ("simmim-like", LARGE, ["block_15/mean/none"]),
    ],
)
def test_what_the_heads_read(name: str, spec: Spec, expected: list[str]):
    assert [str(feature) for feature in preset_of(name).features(spec)] == expected


def test_widths_are_those_of_the_papers():
    """1536 numbers for DINO's ViT-S and ViT-B; DINOv2's widest input is five tokens."""
    for spec in (SMALL, BASE):
        assert preset_of("dino").features(spec)[0].width(spec) == 1536
    assert max(f.width(BASE) for f in preset_of("dinov2").features(BASE)) == 5 * 768


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_a_shallow_backbone_has_what_is_read(name: str, depth: int):
    spec = Spec(dim=24, patch=4, grid=(2, 3), depth=depth)
    for feature in preset_of(name).features(spec):
        assert isinstance(feature, Feature)
        assert feature.blocks(depth)


def test_an_unknown_preset_is_named():
    with pytest.raises(UserError, match="preset is 'mea'; there are mae, mae-large, mocov3"):
        preset_of("mea")
