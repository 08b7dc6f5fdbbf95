"""CKA of networks: a loop in NumPy, invariances, degenerate layers, summaries."""

import numpy as np
import pytest
import torch

from contramask.analysis.cka import compare
from contramask.analysis.grams import SUBLAYERS, Grams, GramStack, grams, standardise
from contramask.analysis.run import analyse
from contramask.types import UserError
from tests.builders import SIZE, randn, tiny_vit

N = 6  # images of a minibatch


def images(count: int = 15) -> list[torch.Tensor]:
    """Three batches of two minibatches and a rest each, then a short one."""
    whole = randn(count, 3, *SIZE, seed=5)
    return [whole[:13], whole[13:]]


def gathered(vit, **options) -> tuple[GramStack, Grams]:
    metric = Grams(**{"batch": N} | options)
    analyse(vit, images(), {"cka": metric})
    return metric.stack(), metric


def unbiased_hsic(k: np.ndarray, l: np.ndarray) -> float:
    """Written out from arXiv:2010.15327, eq. 3, by loops over entries."""
    n = len(k)
    k, l = k.copy(), l.copy()
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l, 0)
    trace = sum(k[i, j] * l[j, i] for i in range(n) for j in range(n))
    inner = sum(k[i, j] * l[j, m] for i in range(n) for j in range(n) for m in range(n))
    mean = k.sum() * l.sum() / ((n - 1) * (n - 2))
    return (trace + mean - 2 / (n - 2) * inner) / (n * (n - 3))


def activations(vit, name: str) -> np.ndarray:
    kept = []
    handle = vit.sites()[name].register_forward_hook(lambda m, a, out: kept.append(out))
    with torch.no_grad():
        vit.eval()(images()[0])
    handle.remove()
    return kept[0].double().numpy()


def test_against_a_loop_over_pairs_of_layers():
    a, b = tiny_vit(seed=1), tiny_vit(seed=2, timm={"embed_dim": 36, "depth": 3})
    sublayers = ("norm1", "attn.qkv", "block")
    found = compare(gathered(a, sublayers=sublayers)[0], gathered(b, sublayers=sublayers)[0])
    assert len(found) == 1  # another depth: no summaries
    labels = found[0].axes["layer_a"]
    assert labels == ("block_00.norm1", "block_00.attn.qkv", "block_00",
                      "block_01.norm1", "block_01.attn.qkv", "block_01")  # fmt: skip
    for i, j in ((0, 0), (1, 4), (2, 8), (5, 3)):
        names = ["blocks.%d.%s", "blocks.%d.%s", "blocks.%d"]
        x, y = (
            activations(v, (n % (k // 3, sublayers[k % 3]) if k % 3 < 2 else n % (k // 3)))
            for v, k, n in ((a, i, names[i % 3]), (b, j, names[j % 3]))
        )
        sums = np.zeros(3)
        for start in (0, N):  # the 13th image is no minibatch, nor are the two of the second batch
            k, l = (z[start : start + N].reshape(N, -1) for z in (x, y))
            k, l = k @ k.T, l @ l.T
            sums += unbiased_hsic(k, l), unbiased_hsic(k, k), unbiased_hsic(l, l)
        expected = sums[0] / np.sqrt(sums[1] * sums[2])
        assert found[0].value[i, j].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_network_with_itself():
    stack, _ = gathered(tiny_vit())
    found = {r.name: r for r in compare(stack, stack, replicates=100)}
    whole = found["cka/flat/raw"]
    assert len(stack.labels) == 2 * (len(SUBLAYERS) + 1)
    torch.testing.assert_close(whole.value.diagonal(), torch.ones(20).double())
    torch.testing.assert_close(whole.value, whole.value.T)
    same = found["cka/flat/raw/same_depth"]
    assert same.axes["sublayer"] == (*SUBLAYERS, "block")
    assert same.value.shape == (10, 2)
    assert found["cka/flat/raw/same_depth_mean"].value == pytest.approx(1)
    assert found["cka/flat/raw/correspondence"].value.tolist() == [0, 1]
    # The mean over the nine places, block outputs left out, of pairs one block apart.
    pairs = [(i, i + 10) for i in range(9)] + [(i + 10, i) for i in range(9)]
    expected = np.mean([whole.value[i, j].item() for i, j in pairs])
    distance = found["cka/flat/raw/by_distance"]
    assert distance.value[1].item() == pytest.approx(expected)
    assert distance.low is None  # of two minibatches


def stack_of(features: torch.Tensor) -> GramStack:
    table = grams(features, N)[:, None]
    return GramStack("flat/raw", ("block_00",), table, tuple(range(len(table))))


def test_what_changes_nothing():
    x, y = randn(18, 1, 7), randn(18, 1, 5, seed=1)
    turn, _ = torch.linalg.qr(randn(7, 7, seed=2))
    expected = compare(stack_of(x), stack_of(y))[0].value
    for other in (x @ turn, 0.01 * x, x + 300.0):
        found = compare(stack_of(other), stack_of(y))[0].value
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert compare(stack_of(x), stack_of(-3 * x))[0].value.item() == pytest.approx(1)


def test_independent_features_have_none_in_the_mean():
    values = torch.stack(
        [
            compare(
                stack_of(randn(60, 1, 9, seed=2 * i)), stack_of(randn(60, 1, 9, seed=2 * i + 1))
            )[0].value
            for i in range(80)
        ]
    )
    error = values.std().item() / 80**0.5
    assert abs(values.mean().item()) < 3.5 * error
    assert error < 0.03


def test_a_layer_that_tells_nothing_apart_is_missing():
    x = stack_of(randn(12, 1, 7))
    found = compare(stack_of(torch.ones(12, 1, 7)), x)[0]
    assert found.missing.all()
    assert list(found.items()) == []
    broken = randn(12, 1, 7)
    broken[4] = torch.nan
    assert compare(x, stack_of(broken))[0].missing.all()


def test_autocast_makes_gram_matrices_no_coarser():
    x = randn(12, 5, 7)
    plain = grams(x, N)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(grams(x, N), plain)


def test_few_minibatches_have_no_interval():
    few = compare(stack_of(randn(42, 1, 7)), stack_of(randn(42, 1, 5, seed=1)), replicates=9)
    many = compare(stack_of(randn(48, 1, 7)), stack_of(randn(48, 1, 5, seed=1)), replicates=9)
    for found, there in ((few, False), (many, True)):
        named = {r.name: r for r in found}
        assert (named["cka/flat/raw/same_depth_mean"].low is not None) == there


@pytest.mark.parametrize("cleaning", ["raw", "standardised"])
def test_what_is_constant_is_missing_whatever_rounding_leaves(cleaning):
    for seed in range(6):
        options = {"pool": "cls", "sublayers": ("norm1", "attn.qkv"), "cleaning": cleaning}
        stack, _ = gathered(tiny_vit(seed=seed), **options)
        found = compare(stack, stack)[0]
        assert found.missing[:2].all()  # of the first block, whose class token no image moved
        assert not found.missing[2:, 2:].any()


@pytest.mark.parametrize("weigh", [None, standardise])
def test_a_last_bit_is_no_feature(weigh):
    x = 3.0 + 2e-7 * randn(12, 5, 7)  # some are the next float32
    assert x.unique().numel() > 1
    assert (grams(x, N, weigh) == 0).all()
    assert (grams(x + 1e-3 * randn(12, 5, 7, seed=1), N, weigh).diagonal(dim1=1, dim2=2) > 0).all()


def test_cleaned_channels():
    vit = tiny_vit()
    with torch.no_grad():  # one channel of huge variance, as in an MAE
        vit.vit.blocks[1].mlp.fc2.weight[3] *= 3000
    options = {"sublayers": ("block",), "pool": "mean"}
    raw, trimmed, standard = (
        gathered(vit, cleaning=c, top=1, **options)[0] for c in ("raw", "trimmed", "standardised")
    )
    assert [s.name for s in (raw, trimmed, standard)] == [
        "mean/raw", "mean/without_top_1", "mean/standardised"
    ]  # fmt: skip
    with torch.no_grad():  # what that channel says, nobody reads
        vit.vit.blocks[1].mlp.fc2.weight[3] *= -7
    again = gathered(vit, cleaning="trimmed", top=1, **options)[0]
    torch.testing.assert_close(again.table, trimmed.table)
    assert (gathered(vit, **options)[0].table[:, 1] / raw.table[:, 1]).median() > 10
    # Standardised, every channel has the same say: the trace counts channels and images.
    trace = standard.table.diagonal(dim1=2, dim2=3).sum(-1)
    torch.testing.assert_close(trace, torch.full_like(trace, 24.0 * N))


def test_class_tokens():
    stack, _ = gathered(tiny_vit(), pool="cls", sublayers=("norm1", "block"))
    found = compare(stack, stack)[0]
    # Before the first attention the class token is the same for all images.
    assert found.missing[0].all()
    assert not found.missing[1:, 1:].any()
    with pytest.raises(UserError, match="class token"):
        gathered(tiny_vit(timm={"class_token": False, "global_pool": ""}), pool="cls")


def test_long_minibatches():
    """However many images run at once, minibatches are whole."""
    metric = Grams(batch=50, sublayers=("block",))
    analyse(tiny_vit(), [randn(101, 3, *SIZE)], {"": metric})
    assert metric.stack().table.shape == (2, 2, 50, 50)
    metric = Grams(batch=100, sublayers=("block",))
    analyse(tiny_vit(), [randn(101, 3, *SIZE)], {"": metric})
    assert len(metric.stack().keys) == 1


def test_mistakes():
    with pytest.raises(UserError, match="at least 4"):
        Grams(batch=3)
    with pytest.raises(UserError, match="minibatch of 14"):
        gathered(tiny_vit(), batch=14)
    with pytest.raises(UserError, match=r"blocks.\*.attn.values.*there are.*attn.qkv"):
        gathered(tiny_vit(), sublayers=("attn.values",))
    with pytest.raises(UserError, match="top is 24 of 24"):
        gathered(tiny_vit(), cleaning="trimmed", top=24, sublayers=("block",))
    x = stack_of(randn(12, 1, 7))
    with pytest.raises(UserError, match="2 minibatches, the other"):
        compare(x, stack_of(randn(18, 1, 7)))
