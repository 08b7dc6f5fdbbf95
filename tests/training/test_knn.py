"""k-NN evaluation under a Lightning Trainer, alone and on two ranks."""

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from contramask import distributed
from contramask.probes.extraction import extract
from contramask.probes.features import Feature
from contramask.probes.knn import KNN
from contramask.training.clean_loaders import CleanImages, check_loaders
from contramask.training.knn import KNNEvaluation
from contramask.types import UserError
from tests.probes.tiny import CLASSES, TinyBackbone, TinyData
from tests.training.test_linear import trainer

pytestmark = [
    # pytorch-lightning's own use of torch.utils._pytree
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning"),
    # its processes are forked, which is the quickest way to have two
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


def test_its_numbers_are_those_of_the_probe_on_extracted_features():
    backbone, data = TinyBackbone(), TinyData()
    module = KNNEvaluation(backbone, ks=(1, 4, 20), feature=Feature(pool="mean"))
    (logged, *_) = trainer().validate(module, datamodule=CleanImages(data), verbose=False)
    x, y = extract(backbone, data.clean_dataloader("train"), feature=Feature(pool="mean"))
    v, w = extract(backbone, data.clean_dataloader("val"), feature=Feature(pool="mean"))
    probe = KNN(CLASSES, ks=(1, 4, 20))
    probe.fit(x, y)
    values = module.result["values"]
    assert set(values) == {"k1_top1", "k4_top1", "k20_top1", "k20_top5", "images"}
    for k, votes in probe.votes(v).items():
        right = (votes.argmax(1) == w).float().mean().item()
        assert values[f"k{k}_top1"] == pytest.approx(right)
        assert logged[f"knn/k{k}_top1"] == pytest.approx(right)
    assert values["k20_top1"] > 2 / CLASSES
    assert "bank of 50 train images; mean of patches" in module.result["protocol"]


def test_a_k_larger_than_the_bank_is_named():
    module = KNNEvaluation(TinyBackbone(), ks=(200,))
    with pytest.raises(UserError, match="k is 200; the bank has 50"):
        trainer().validate(module, datamodule=CleanImages(TinyData()), verbose=False)


def test_of_several_ks_those_beyond_the_bank_are_skipped_and_counted():
    module = KNNEvaluation(TinyBackbone(), ks=(10, 51, 200), metrics=("cosine", "dot", "l2"))
    trainer().validate(module, datamodule=CleanImages(TinyData()), verbose=False)
    assert set(module.result["values"]) == {"k10_top1", "k10_top5", "images"}
    assert [row["k"] for row in module.result["table"]] == [10, 10, 10]
    assert module.result["notes"] == [
        "k = 51, 200: more than the bank of 50 rows allows, 6 numbers skipped"
    ]
    assert "k = 10, bank of 50" in module.result["protocol"]


def test_limit_reaches_the_loaders():
    module = KNNEvaluation(TinyBackbone(), ks=(3,))
    trainer().validate(module, datamodule=CleanImages(TinyData(), limit=6), verbose=False)
    assert module.result["values"]["images"] == 6


class RankData(TinyData):
    """The part of whichever rank asks."""

    def clean_dataloader(self, split, limit=None):
        self.rank, self.world = distributed.rank(), distributed.world()
        return super().clean_dataloader(split, limit)


@pytest.mark.parametrize("limit", [None, 6])
def test_two_ranks_with_unequal_parts_count_what_one_counts(limit: int | None):
    """Of few images the second rank has none at all."""
    found = [
        trainer(devices=devices, strategy=strategy).validate(
            KNNEvaluation(TinyBackbone(), ks=(1, 6)),
            datamodule=CleanImages(RankData(), limit=limit),
            verbose=False,
        )[0]
        for devices, strategy in ((1, "auto"), (2, "ddp_fork"))
    ]
    assert found[0] == pytest.approx(found[1])
    assert found[1]["knn/images"] == (limit or 17)


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 9

    def __getitem__(self, index):
        return index


def test_a_sampler_that_repeats_images_is_refused():
    loader = DataLoader(Images())
    even = DataLoader(Images(), sampler=DistributedSampler(Images(), num_replicas=3, rank=0))
    uneven = DataLoader(Images(), sampler=DistributedSampler(Images(), num_replicas=2, rank=0))
    check_loaders([loader, even])
    with pytest.raises(UserError, match="the sampler of val repeats images"):
        check_loaders([loader, uneven])
