"""Features: what they are, that training goes on undisturbed, that ranks bring them together."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from contramask.data.examples import CLEAN as DATA_CLEAN
from contramask.probes.extraction import extract, gather_rows, read
from contramask.probes.features import CLEAN, Feature, features, frozen
from contramask.types import Batch, UserError
from tests.probes.tiny import GRID, SIZE, D, TinyBackbone, batches

B = 5


def test_the_pools_are_class_token_mean_of_patches_and_both():
    backbone, image = TinyBackbone().eval(), torch.randn(B, 3, *SIZE)
    tokens = backbone(image)
    assert tokens.patch.shape == (B, GRID[0] * GRID[1], D)
    cls, mean = tokens.prefix[:, 0], tokens.patch.sum(1) / 6  # the register is in neither
    torch.testing.assert_close(features(backbone, image), cls)
    torch.testing.assert_close(features(backbone, image, pool="mean"), mean)
    both = features(backbone, image, pool="cls+mean")
    torch.testing.assert_close(both, torch.cat([cls, mean], 1))
    for pool in ("cls", "mean", "cls+mean"):
        found = features(backbone, image, pool=pool)
        assert found.shape[1] == Feature(pool=pool).width(backbone.spec)


def test_a_backbone_without_class_token_is_named():
    backbone, image = TinyBackbone(tokens=0).eval(), torch.randn(B, 3, *SIZE)
    with pytest.raises(UserError, match="no class token; allowed is mean"):
        features(backbone, image)
    assert features(backbone, image, pool="mean").shape == (B, D)


def test_features_are_refused_in_train_mode():
    with pytest.raises(AssertionError, match="eval mode"):
        features(TinyBackbone(), torch.randn(B, 3, *SIZE))


def test_frozen_gives_each_submodule_its_own_mode_back():
    backbone = TinyBackbone()
    backbone.dropout.eval()
    seen = []

    def fail():
        with frozen(backbone):
            seen.append(any(m.training for m in backbone.modules()) or torch.is_grad_enabled())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert seen == [False]
    assert backbone.training
    assert backbone.norm.training
    assert not backbone.dropout.training
    assert torch.is_grad_enabled()


def test_extract_reads_every_labelled_image_once_and_leaves_the_backbone_as_it_was():
    backbone = TinyBackbone()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    random = torch.get_rng_state()
    parts = batches((4, 3, 6), unlabelled=2)
    x, y = extract(backbone, parts, feature=Feature(pool="cls+mean"))
    assert x.shape == (11, 2 * D)
    assert x.dtype == torch.float32
    assert not x.requires_grad
    assert torch.equal(y, torch.cat([b["label"] for b in parts])[2:])
    assert backbone.training
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    backbone.eval()
    assert torch.equal(x[2:5], features(backbone, parts[1]["views"][CLEAN][0], pool="cls+mean"))


def test_extract_of_nothing_is_no_row():
    x, y = extract(TinyBackbone(), [])
    assert x.shape == (0, D)
    assert y.shape == (0,)


def test_autocast_computes_in_bfloat16_and_returns_float32():
    backbone, parts = TinyBackbone(), batches((6,))
    exact, _ = extract(backbone, parts, feature=Feature(pool="mean"))
    rough, _ = extract(backbone, parts, feature=Feature(pool="mean"), autocast=True)
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough)
    torch.testing.assert_close(exact, rough, rtol=0, atol=0.05)


def test_a_batch_without_clean_view_is_named():
    batch = Batch(views={"global": torch.zeros(2, B, 3, *SIZE)}, label=torch.zeros(B).long(),
                  position=0)  # fmt: skip
    with pytest.raises(UserError, match=r"views \['global'\]; probes read one named 'clean'"):
        read(TinyBackbone().eval(), batch, [Feature()])


def test_data_and_probes_call_the_clean_view_alike():
    assert CLEAN == DATA_CLEAN


def gather_on(rank: int, address: str, results: dict) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=3)
    sizes = ((5, 4, 1), (), (2,))[rank]  # the second rank has no image
    x, y = extract(TinyBackbone(), batches(sizes, seed=rank))
    alone, _ = extract(TinyBackbone(), batches(sizes, seed=rank), gathered=False)
    # More rows than travel at once.
    many = torch.arange(70_000 * rank) + rank
    results[rank] = (x.numpy(), y.numpy(), len(alone), gather_rows(many).numpy())
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_ranks_of_unequal_length_bring_everything_together_once(tmp_path):
    context = mp.get_context("fork")
    results = context.Manager().dict()
    mp.start_processes(
        gather_on, (f"file://{tmp_path}/rendezvous", results), nprocs=3, start_method="fork"
    )
    parts = [
        extract(TinyBackbone(), batches(s, seed=r)) for r, s in enumerate([(5, 4, 1), (), (2,)])
    ]
    x, y = (torch.cat(part) for part in zip(*parts, strict=True))
    many = torch.cat([torch.arange(70_000 * rank) + rank for rank in range(3)])
    for rank in range(3):
        found = [torch.from_numpy(v) for v in (*results[rank][:2], results[rank][3])]
        assert torch.equal(found[0], x)
        assert torch.equal(found[1], y)
        assert results[rank][2] == (10, 0, 2)[rank]
        assert torch.equal(found[2], many)
