"""The measure itself: it sees a wrong entry, and what was not kept through the norm."""

import os

import pytest
import torch
from scripts.reduce_parity import MOST, Drawn, thin, unpack

from tests.builders import randn
from tests.conftest import REPO
from tests.parity.deviations import deviation


@pytest.mark.parametrize("shape", [(), (5,), (24, 32), (3, 100, 7)])
def test_thinned_tensors_meet_every_row_and_column(shape):
    full = randn(*shape)
    kept = thin(full)
    assert kept["values"].numel() <= MOST
    assert kept["shape"] == shape
    marks = torch.zeros(full.numel())
    marks[:: kept["stride"]] = 1
    for axis in range(len(shape)):
        rest = [i for i in range(len(shape)) if i != axis]
        assert (marks.view(shape).sum(rest) > 0 if rest else marks > 0).all()
    for measure in ("absolute", "relative", "of_max"):
        assert deviation(full, kept, measure) == pytest.approx(0, abs=1e-12)
        assert deviation(full, full, measure) == 0


def test_a_wrong_entry_is_seen():
    full = randn(24, 32)
    kept = thin(full)
    wrong = full.clone()
    wrong.view(-1)[2 * kept["stride"]] += 0.5
    assert deviation(wrong, kept, "absolute") == pytest.approx(0.5)
    assert deviation(wrong, full, "of_max") == pytest.approx(0.5 / full.abs().max().item())
    assert deviation(torch.tensor(1.1), 1.0, "relative") == pytest.approx(0.1, rel=1e-5)


def test_what_was_not_kept_shows_in_the_norm():
    full = randn(24, 32)
    kept = thin(full)
    left = torch.ones(full.numel()).bool()
    left[:: kept["stride"]] = False
    wrong = full.clone().view(-1)
    wrong[left] *= 1.01
    assert deviation(wrong.view(24, 32), kept, "absolute") > 1e-3


def test_not_a_number_is_never_near():
    full = randn(24, 32)
    wrong = full.clone()
    wrong[0, 0] = torch.nan
    assert not deviation(wrong, full, "absolute") <= 1e9
    assert not deviation(wrong, thin(full), "absolute") <= 1e9


def test_sizes_have_to_agree():
    with pytest.raises(AssertionError):
        deviation(randn(3, 4), randn(4, 3), "absolute")
    with pytest.raises(AssertionError):
        deviation(randn(3, 5), thin(randn(4, 3)), "absolute")


def test_what_a_seed_gave_comes_back_bit_by_bit():
    noise = torch.Generator().manual_seed(11)
    base = {"a": randn(3, 5), "b": randn(7)}
    tree = {
        "base": base,
        "moved": {k: v + 0.3 * torch.randn(v.shape, generator=noise) for k, v in base.items()},
    }
    tree["moved"]["b"][2] = 1.5  # what the seed did not give is kept too
    expected = {k: v.clone() for k, v in tree["moved"].items()}
    paths = [("moved", "a"), ("moved", "b")]
    packed = Drawn(paths, [(11, 0.3)], base=[("base", "a"), ("base", "b")]).pack(tree)
    assert (tree["moved"]["a"] == 0).all()
    assert (tree["moved"]["b"] == 0).sum() == 6
    unpack(tree, packed)
    for name, value in expected.items():
        torch.testing.assert_close(tree["moved"][name], value, rtol=0, atol=0)


def test_another_generator_is_refused():
    tree = {"x": torch.randn(4, 6, generator=torch.Generator().manual_seed(2))}
    packed = Drawn([("x",)], [(2, 1.0)]).pack(tree)
    packed["noise"] = [(3, 1.0)]
    with pytest.raises(ValueError, match="CONTRAMASK_PARITY"):
        unpack(tree, packed)


@pytest.mark.parametrize("name", ["mae", "mocov3", "dino"])
def test_the_reduced_copies_hold_what_the_full_files_hold(name, parity, monkeypatch):
    reduced = parity(name)
    if not (REPO.parent / "shared" / "parity").is_dir() and "CONTRAMASK_PARITY" not in os.environ:
        pytest.skip("the full files are not here: set CONTRAMASK_PARITY to their folder")
    monkeypatch.setenv(
        "CONTRAMASK_PARITY",
        os.environ.get("CONTRAMASK_PARITY", str(REPO.parent / "shared" / "parity")),
    )
    full = parity(name)
    assert compare(reduced, full) > 50


def compare(reduced, full) -> int:
    """How many tensors were found equal; what is thinned by what was kept."""
    if isinstance(reduced, dict) and "stride" in reduced:
        assert deviation(full, reduced, "absolute") < 5e-8  # float64 tables are kept as float32
        return 1
    if isinstance(reduced, dict):
        return sum(compare(v, full[k]) for k, v in reduced.items())
    if isinstance(reduced, list | tuple):
        return sum(compare(a, b) for a, b in zip(reduced, full, strict=True))
    if isinstance(reduced, torch.Tensor):
        torch.testing.assert_close(reduced, full, rtol=0, atol=0)
        return 1
    assert reduced == full
    return 0
