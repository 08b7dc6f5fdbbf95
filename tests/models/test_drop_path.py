"""Drop path: which rate in which block, and exactly so many samples of a batch."""

import pytest
import torch
from timm.layers.drop import DropPath

from contramask.models.drop_path import SubsetDropPath
from contramask.models.vit import VisionTransformer
from tests.builders import randn, tiny_vit


@pytest.mark.parametrize(
    ("batch", "rate", "kept"), [(10, 0.3, 7), (7, 0.4, 4), (3, 0.9, 1), (1, 0.5, 1), (5, 0.0, 5)]
)
def test_exactly_so_many_samples_are_kept(batch, rate, kept):
    torch.manual_seed(0)
    drop, x = SubsetDropPath(rate).train(), torch.ones(batch, 3, 4)
    seen = set()
    for _ in range(20):
        rows = drop(x).flatten(1)
        assert (rows == rows[:, :1]).all()
        assert rows[:, 0].count_nonzero() == kept
        torch.testing.assert_close(rows[rows > 0].unique(), torch.tensor([batch / kept]))
        seen.add(tuple(rows[:, 0].tolist()))
    assert len(seen) > 1 or kept == batch


def test_the_mean_is_the_branch():
    torch.manual_seed(0)
    drop, x = SubsetDropPath(0.3).train(), randn(10, 2, 3)
    mean = torch.stack([drop(x) for _ in range(4000)]).mean(0)
    # A sample is 0 or 10/7 of itself: the standard error is sqrt(0.3 / 0.7 / 4000) of it.
    assert ((mean - x).abs() <= 5 * (0.3 / 0.7 / 4000) ** 0.5 * x.abs()).all()


def test_gradients_are_of_the_samples_that_are_kept():
    torch.manual_seed(0)
    x = randn(10, 2, 3).requires_grad_()
    out = SubsetDropPath(0.3).train()(x)
    out.sum().backward()
    kept = out.detach().flatten(1).any(1)
    assert kept.sum() == 7
    expected = torch.where(kept, 10 / 7, 0.0)[:, None, None].expand_as(x)
    torch.testing.assert_close(x.grad, expected)


def test_nothing_is_dropped_in_evaluation():
    x = randn(10, 2, 3)
    assert SubsetDropPath(0.3).eval()(x) is x


def test_a_function_of_the_seed():
    drop, x = SubsetDropPath(0.5).train(), randn(10, 2, 3)
    first = drop(x) if torch.manual_seed(4) else x
    again = drop(x) if torch.manual_seed(4) else x
    assert torch.equal(first, again)
    assert not torch.equal(drop(x), again)


@pytest.mark.parametrize(("kind", "made"), [("uniform", DropPath), ("subset", SubsetDropPath)])
def test_one_rate_for_all_blocks(kind, made):
    backbone = tiny_vit(drop_path=kind, timm={"depth": 3, "drop_path_rate": 0.2})
    paths = [p for b in backbone.vit.blocks for p in (b.drop_path1, b.drop_path2)]
    assert [(type(p), p.drop_prob) for p in paths] == [(made, 0.2)] * 6
    assert len(set(map(id, paths))) == 6
    plain = tiny_vit(timm={"depth": 3}).eval()
    plain.load_state_dict(backbone.state_dict())
    x = randn(5, 3, 16, 20)
    assert torch.equal(backbone.eval()(x).cls, plain(x).cls)
    assert not torch.equal(backbone.train()(x).cls, plain(x).cls)


def test_a_branch_of_a_subset():
    """With every branch of one sample out of two left out, half the images pass untouched."""
    backbone = tiny_vit(drop_path="subset", timm={"depth": 1, "drop_path_rate": 0.5})
    block, x = backbone.vit.blocks[0], randn(6, 4, 24)
    block.mlp.fc2.weight.data.zero_()
    assert (block(x) == x).all(2).all(1).sum() == 3


@pytest.mark.parametrize("kind", ["growing", "uniform", "subset"])
def test_it_is_rebuilt_from_its_sheet(kind):
    backbone = tiny_vit(drop_path=kind, timm={"drop_path_rate": 0.2})
    again = VisionTransformer(**backbone.config)
    assert str(again) == str(backbone)


def test_without_a_rate_there_is_none():
    assert str(tiny_vit(drop_path="subset")) == str(tiny_vit())
