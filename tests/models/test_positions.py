"""Positions on other grids: against timm, a loop of cubic weights, and DINO's own tensors."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table

from contramask.models.positions import RelativeBias, resize_positions, resize_relative
from contramask.models.vit import VisionTransformer
from tests.builders import randn, tiny_vit

OLD = (4, 5)
GRIDS = [(7, 9), (2, 3), (4, 8), (6, 5), (3, 11)]


def cubic(x: float, a: float = -0.75) -> float:
    """Keys' kernel as torch uses it without antialiasing."""
    x = abs(x)
    if x <= 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def weights(old: int, new: int, scale: float) -> torch.Tensor:
    """(new, old): how much of each old place is in a new one; beyond the edge stands the edge."""
    table = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        place = (i + 0.5) / scale - 0.5
        for j in range(math.floor(place) - 1, math.floor(place) + 3):
            table[i, min(max(j, 0), old - 1)] += cubic(place - j)
    return table


def by_loop(table, old, new, prefix, offset):
    rows, columns = (weights(o, n, (n + offset) / o) for o, n in zip(old, new, strict=True))
    patches = table[0, prefix:].double().unflatten(0, old)
    found = torch.einsum("ir,jc,rcd->ijd", rows, columns, patches)
    return torch.cat([table[:, :prefix].double(), found.flatten(0, 1)[None]], 1)


@pytest.mark.parametrize("new", GRIDS)
@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("method", ["plain", "dino"])
def test_without_antialiasing_against_a_loop(new, prefix, method):
    table = randn(1, prefix + 20, 6)
    found = resize_positions(table, OLD, new, prefix, method)
    expected = by_loop(table, OLD, new, prefix, 0.1 if method == "dino" else 0.0)
    assert torch.equal(found[:, :prefix], table[:, :prefix])
    torch.testing.assert_close(found.double(), expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("new", GRIDS)
@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("antialias", [True, False])
def test_as_timm_does(new, prefix, antialias):
    table = randn(1, prefix + 20, 6)
    found = resize_positions(table, OLD, new, prefix, "antialias" if antialias else "plain")
    expected = resample_abs_pos_embed(
        table, list(new), list(OLD), num_prefix_tokens=prefix, antialias=antialias
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", ["antialias", "plain", "dino"])
def test_the_same_grid_is_the_same_table(method):
    table = randn(1, 22, 6)
    assert resize_positions(table, OLD, OLD, 2, method) is table


@settings(max_examples=30)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    method=st.sampled_from(["antialias", "plain", "dino"]),
)
def test_a_constant_stays_one(rows, columns, method):
    """Weights sum to one on any grid, and DINO's offset never makes a row too many."""
    table = torch.full((1, 21, 3), 0.25)
    found = resize_positions(table, OLD, (rows, columns), 1, method)
    assert found.shape == (1, 1 + rows * columns, 3)
    torch.testing.assert_close(found, torch.full_like(found, 0.25), atol=1e-6, rtol=0)


def test_half_precision_comes_back_as_it_was():
    table = randn(1, 21, 6).bfloat16()
    found = resize_positions(table, OLD, (6, 7), 1, "plain")
    assert found.dtype == torch.bfloat16
    exact = resize_positions(table.float(), OLD, (6, 7), 1, "plain")
    torch.testing.assert_close(found, exact.bfloat16())


def test_methods_differ():
    table = randn(1, 20, 6)
    a, b, c = (resize_positions(table, OLD, (2, 3), 0, m) for m in ("antialias", "plain", "dino"))
    assert (a - b).abs().max() > 0.05
    assert (b - c).abs().max() > 0.01


def test_the_backbone_uses_its_method():
    x = randn(2, 3, 24, 16)
    found = {}
    for method in ("antialias", "plain", "dino"):
        backbone = tiny_vit(interpolation=method).eval()
        torch.nn.init.normal_(backbone.vit.pos_embed, generator=torch.Generator().manual_seed(1))
        found[method] = backbone(x).patch
        table = resize_positions(backbone.vit.pos_embed, OLD, (6, 4), 1, method)
        other = tiny_vit(img_size=(24, 16)).eval()
        state = backbone.state_dict() | {"vit.pos_embed": table}
        other.load_state_dict(state)
        torch.testing.assert_close(other(x).patch, found[method], atol=1e-6, rtol=0)
        assert backbone.config["interpolation"] == method
    assert not torch.allclose(found["antialias"], found["plain"], atol=1e-3)
    assert not torch.allclose(found["plain"], found["dino"], atol=1e-3)


@pytest.fixture(scope="module")
def dino(parity):
    return parity("dino")["features"]


@pytest.fixture(scope="module")
def official(dino):
    backbone = VisionTransformer(
        img_size=32,
        patch_size=8,
        interpolation="dino",
        timm={"embed_dim": 64, "depth": 3, "num_heads": 4},
    )
    backbone.vit.load_state_dict(dino["state_dict"])
    return backbone.eval()


@pytest.mark.parametrize(("name", "grid"), [("pos48", (6, 6)), ("pos16", (2, 2))])
def test_tables_of_dino(dino, name, grid):
    found = resize_positions(dino["state_dict"]["pos_embed"], (4, 4), grid, 1, "dino")
    torch.testing.assert_close(found, dino[name], atol=1e-7, rtol=0)


@pytest.mark.parametrize("size", ["32", "48", "rect"])
def test_features_of_dino_on_other_sizes(dino, official, size):
    found = official(dino[f"x{size}"]).cls
    torch.testing.assert_close(found, dino[f"cls{size}"], atol=5e-6, rtol=0)


def test_last_blocks_of_dino(dino, official):
    """Its linear probe reads the normed class token of the last n blocks, or adds the mean."""
    tokens = official(dino["x32"], layers=(0, 1, 2))
    normed = [official.vit.norm(tokens.layers[i]) for i in range(3)]
    found = torch.cat([x[:, 0] for x in normed], -1)
    torch.testing.assert_close(found, dino["lin_n3"], atol=5e-6, rtol=0)
    found = torch.stack([tokens.cls, tokens.patch.mean(1)], -1).flatten(1)  # side by side
    torch.testing.assert_close(found, dino["lin_n1_avg"], atol=5e-6, rtol=0)


def test_a_bias_for_each_block():
    """The blocks differ, and each sees its own: with equal tables it is the shared bias."""
    shared = tiny_vit(positions="relative").eval()
    apart = tiny_vit(positions="relative_per_block").eval()
    tables = [randn(66, 3, seed=i) for i in range(2)]
    shared.bias.relative_position_bias_table.data.copy_(tables[0])
    state = {f"vit.{k}": v for k, v in shared.vit.state_dict().items()}
    x = randn(2, 3, 16, 20)
    for second, same in ((tables[0], True), (tables[1], False)):
        for i, table in enumerate((tables[0], second)):
            state[f"bias.{i}.relative_position_bias_table"] = table
        apart.load_state_dict(state)
        assert torch.equal(apart(x).cls, shared(x).cls) == same


def test_relative_bias_has_timm_s_order():
    from timm.layers.pos_embed_rel import RelPosBias

    ours, theirs = RelativeBias(OLD, 3), RelPosBias(OLD, 3, prefix_tokens=1)
    ours.relative_position_bias_table.data.copy_(theirs.relative_position_bias_table.data)
    assert torch.equal(ours.get_bias(), theirs.get_bias())


def relative(function, grid: tuple[int, int]) -> torch.Tensor:
    """A table for one head, of a function of the two differences, and three numbers more."""
    down, right = (np.arange(2 * side - 1.0) - side + 1 for side in grid)
    values = torch.from_numpy(function(down[:, None], right[None])).flatten()
    return torch.cat([values, torch.tensor([7.0, 8.0, 9.0])])[:, None].float()


def test_relative_positions_near_the_middle_stay():
    """A difference of one patch stays one; all beside it is smooth."""
    table = randn((2 * 4 - 1) * (2 * 3 - 1) + 3, 2)
    found = resize_relative(table, (4, 3), (6, 8))
    assert found.shape == ((2 * 6 - 1) * (2 * 8 - 1) + 3, 2)
    old = table[:-3].unflatten(0, (7, 5))[2:5, 1:4]
    new = found[:-3].unflatten(0, (11, 15))[4:7, 6:9]
    torch.testing.assert_close(new, old, atol=1e-5, rtol=0)
    assert torch.equal(found[-3:], table[-3:])


@pytest.mark.parametrize(("old", "new"), [((5, 5), (8, 8)), ((4, 6), (5, 7)), ((7, 7), (3, 3))])
def test_stretched_positions_give_back_a_cubic(old, new):
    """Splines through a polynomial of third degree are that polynomial, wherever they are fixed."""

    def function(down, right):
        return 0.01 * down**3 - 0.2 * right**2 + 0.1 * down * right

    def stretched(side, wider):
        """q such that 1 + q + ... fills the wider table, by roots of the polynomial."""
        coefficients = np.ones(side - 1)
        coefficients[-1] -= wider - 1
        real = [r.real for r in np.roots(coefficients) if abs(r.imag) < 1e-9 and r.real > 0]
        q = min(max([*real, 0.0]), 1.5)
        far = np.cumsum(max(q, 1.01) ** np.arange(side - 1))
        return np.concatenate([-far[::-1], [0.0], far])

    down, right = (stretched(o, n) for o, n in zip(old, new, strict=True))
    values = torch.from_numpy(function(down[:, None], right[None])).flatten().float()
    table = torch.cat([values, torch.tensor([7.0, 8.0, 9.0])])[:, None]
    expected = relative(function, new)
    torch.testing.assert_close(resize_relative(table, old, new), expected, atol=2e-4, rtol=0)


def test_resized_relative_positions_are_near_timm_s():
    """timm draws straight lines between the same places."""
    table = relative(lambda down, right: np.exp(-(down**2 + right**2) / 200), (14, 14))
    found = resize_relative(table, (14, 14), (24, 24))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # timm indexes with a list
        expected = resize_rel_pos_bias_table(table, (24, 24), (47 * 47 + 3, 1))
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)


def test_resized_relative_positions_of_one_grid_and_type():
    table = randn(9 * 9 + 3, 2).half()
    assert resize_relative(table, (5, 5), (5, 5)) is table
    assert resize_relative(table, (5, 5), (2, 2)).dtype == torch.float16
    assert resize_relative(randn(3 * 3 + 3, 2), (2, 2), (3, 3)).isfinite().all()
