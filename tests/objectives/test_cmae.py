"""CMAE's contrast: what is pooled, which tokens of the teacher, crop by crop, and its views."""

import math

import pytest
import torch

from contramask.masks import RandomMasking
from contramask.objectives.cmae import CMAEContrast
from contramask.objectives.mae import MAE
from contramask.training.plan import plan
from contramask.types import Batch, Spec, Step, Tokens, UserError
from tests.builders import randn

SPEC = Spec(dim=20, patch=4, grid=(2, 3), depth=3)
SIZES = {"out": 6, "hidden": 14, "dim": 16, "depth": 1, "heads": 2}
STEP = Step(2, 0.1)
IMAGES = 5


def case(crops=1, **changes):
    torch.manual_seed(0)
    objective = CMAEContrast(SPEC, mask="hide", **SIZES | changes)
    rows = crops * IMAGES
    mask = RandomMasking(SPEC, ratio=0.5).sample("hide", IMAGES, crops, STEP, "cpu")
    student = Tokens(randn(rows, 2, 20), randn(rows, 3, 20, seed=1), mask)
    layers = {2: randn(rows, 2 + 6, 20, seed=2)}
    teacher = Tokens(randn(rows, 2, 20, seed=3), randn(rows, 6, 20, seed=4), None, layers)
    feats = dict(zip(objective.passes, (student, teacher), strict=True))
    views = {k: torch.zeros(crops, IMAGES, 3, 8, 12) for k in ("mild", "shifted")}
    return objective, feats, Batch(views=views, label=torch.zeros(IMAGES).long(), position=0)


def batch_norm(x):
    return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-6).sqrt()


def head(net, x):
    """A head written out: batch statistics, scale 1 and shift 0 as drawn."""
    x = batch_norm(x @ net[0].weight.T + net[0].bias).clamp(min=0)
    return x @ net[3].weight.T


@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("crops", [1, 2])
def test_loss_by_a_loop(final_norm, crops):
    objective, feats, batch = case(crops, final_norm=final_norm)
    student, teacher = feats.values()
    losses = []
    for v in range(crops):
        rows = slice(v * IMAGES, (v + 1) * IMAGES)
        decoded = objective.decoder(student)[rows].mean(1)
        shown = (teacher.patch if final_norm else teacher.layers[2][:, 2:])[rows].mean(1)
        q = head(objective.predictor, head(objective.projector, decoded))
        k = head(objective.projector, shown)
        for i in range(IMAGES):
            cosines = [torch.cosine_similarity(q[i], k[j], dim=0).item() / 0.07 for j in range(5)]
            losses.append(math.log(sum(map(math.exp, cosines))) - cosines[i])
    found = objective(feats, batch, STEP).value.item()
    assert found == pytest.approx(2 * 0.07 * sum(losses) / len(losses), rel=1e-4)


def test_it_shares_the_masked_pass_with_mae():
    terms = {
        "reconstruct": MAE(SPEC, mask="hide", dim=16, depth=1, heads=2),
        "contrast": CMAEContrast(SPEC, mask="hide", **SIZES),
    }
    passes = plan(terms)
    assert [str(p) for p in passes] == [
        "teacher · shifted · with blocks 2",
        "student · mild · masked by hide",
    ]


def test_sizes_of_the_paper():
    spec = Spec(dim=768, patch=16, grid=(14, 14), depth=12)
    objective = CMAEContrast(spec, mask="hide")
    shapes = {n: tuple(p.shape) for n, p in objective.named_parameters() if p.ndim == 2}
    assert shapes["projector.0.weight"] == (1536, 768)
    assert shapes["projector.3.weight"] == shapes["predictor.3.weight"] == (256, 1536)
    assert shapes["predictor.0.weight"] == (1536, 256)
    assert shapes["decoder.out.weight"] == (768, 512)
    assert objective.projector[0].bias is not None
    assert objective.projector[3].bias is None
    assert len(objective.decoder.blocks) == 2


def test_views_need_equally_many_crops():
    objective = case()[0]
    with pytest.raises(UserError, match=r"'mild' has 2, view 'shifted' has 1; set data.views"):
        objective.check({"mild": 2, "shifted": 1}, IMAGES)


def test_two_ranks_are_one_process(monkeypatch):
    """Keys of all ranks, each rank's labels where its own keys begin; heads without batch norm."""
    objective, feats, _ = case()
    objective.projector = objective.predictor = torch.nn.Identity()
    objective.teacher = torch.nn.Identity()

    def of(rows: slice) -> float:
        parts = {}
        for reads, t in feats.items():
            mask = t.mask
            if mask is not None:
                mask = mask._replace(hidden=mask.hidden[rows], targets=mask.targets[rows])
            layers = {i: x[rows] for i, x in t.layers.items()}
            parts[reads] = Tokens(t.prefix[rows], t.patch[rows], mask, layers)
        label = torch.zeros(len(range(*rows.indices(4)))).long()
        views = {k: torch.zeros(1, len(label), 3, 8, 12) for k in ("mild", "shifted")}
        return objective(parts, Batch(views=views, label=label, position=0), STEP).value.item()

    whole = of(slice(0, 4))
    keys = feats[objective.passes[1]].layers[2][:4, 2:].mean(1)
    keys = torch.nn.functional.normalize(keys, dim=-1)
    monkeypatch.setattr("contramask.objectives.cmae.gather", lambda k: keys)
    losses = []
    for rank in (0, 1):
        monkeypatch.setattr("contramask.objectives.cmae.rank", lambda r=rank: r)
        losses.append(of(slice(2 * rank, 2 * rank + 2)))
    assert losses[0] != losses[1]
    assert sum(losses) / 2 == pytest.approx(whole, rel=1e-5)
