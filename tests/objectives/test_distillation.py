"""DINO, iBOT and KoLeo: loops over images, centres, heads, quirks of the official codes."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from contramask.masks import VariedBlockMasking
from contramask.models.ema import EmaCopy
from contramask.models.heads import PrototypeHead, TokenHeads
from contramask.objectives.dino import DINO, entropies
from contramask.objectives.ibot import IBOT
from contramask.objectives.koleo import KoLeo
from contramask.objectives.objective import Objective
from contramask.schedule import Schedule
from contramask.types import Batch, Mask, Spec, Step, Tokens, UserError
from tests.builders import randn

SPEC = Spec(dim=12, patch=4, grid=(3, 5), depth=2)
SIZES = {"hidden": 16, "bottleneck": 6}
IMAGES, LOCALS = 4, 3
STEP = Step(0, 0.25)


def given(objective: Objective, seed: int = 0) -> tuple[dict, Batch]:
    """Random tokens of every pass; a fifth of the images hides nothing."""
    hidden = VariedBlockMasking(SPEC, whole=0.2).sample("m", IMAGES, 2, Step(seed, 0.0), "cpu")
    feats = {}
    for i, reads in enumerate(objective.passes):
        rows = IMAGES * (LOCALS if reads.view == "local" else 2)
        cls, patch = randn(rows, 1, 12, seed=seed + i), randn(rows, 15, 12, seed=seed + i + 50)
        feats[reads] = Tokens(cls, patch, hidden if reads.mask else None)
    views = {"global": torch.zeros(2, IMAGES, 3, 12, 20)}
    return feats, Batch(views=views, label=torch.zeros(IMAGES).long(), position=0)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def ce(target: np.ndarray, scores: np.ndarray) -> float:
    return float(-(target * np.log(softmax(scores / 0.1))).sum())


def numbers(module: nn.Module, *args: object) -> np.ndarray:
    with torch.no_grad():
        return module(*args).double().numpy()


def test_dino_is_a_loop_over_pairs_of_crops():
    torch.manual_seed(0)
    objective = DINO(SPEC, out=9, **SIZES, teacher_temperature=0.05)
    objective.centre.copy_(randn(9, seed=7) / 10)
    feats, batch = given(objective)
    student, teacher, local = (feats[p].cls for p in objective.passes)
    scores = numbers(objective.head, torch.cat([student, local])).reshape(5, IMAGES, 9)
    taught = numbers(objective.teacher, teacher).reshape(2, IMAGES, 9)
    pairs = []
    for g in range(2):
        target = softmax((taught[g] - objective.centre.numpy()) / 0.05)
        for v in range(5):
            errors = [ce(target[b], scores[v, b]) for b in range(IMAGES)]
            pairs += [np.mean(errors)] if v != g else []
    loss = objective(feats, batch, STEP)
    assert len(pairs) == 2 * (2 + LOCALS) - 2
    assert loss.value.item() == pytest.approx(np.mean(pairs), rel=1e-5)
    expected = 0.9 * objective.centre.numpy() + 0.1 * taught.reshape(-1, 9).mean(0)
    np.testing.assert_allclose(loss.state["centre"].numpy(), expected, rtol=1e-5, atol=1e-7)


def test_a_loss_changes_nothing():
    objective = DINO(SPEC, out=9, **SIZES)
    before = {k: v.clone() for k, v in objective.state_dict().items()}
    objective(*given(objective), STEP)
    assert all(torch.equal(v, before[k]) for k, v in objective.state_dict().items())


def test_the_teachers_temperature_is_a_function_of_progress():
    schedule = Schedule(peak=0.07, start=0.04, warmup=0.5, shape="constant")
    objective = DINO(SPEC, out=9, **SIZES, teacher_temperature=schedule)
    fixed = DINO(SPEC, out=9, **SIZES, teacher_temperature=0.055)
    fixed.load_state_dict(objective.state_dict())
    found, expected = (o(*given(o), STEP).value for o in (objective, fixed))
    assert torch.equal(found, expected)


def test_entropies_tell_the_two_collapses():
    uniform = entropies(torch.full((6, 5), 0.2))
    assert [x.item() for x in uniform.values()] == pytest.approx([math.log(5)] * 2)
    single = entropies(torch.eye(5)[[2] * 6])
    assert [x.item() for x in single.values()] == [0.0, 0.0]
    healthy = entropies(torch.eye(5))
    assert [x.item() for x in healthy.values()] == pytest.approx([0.0, math.log(5)])


@pytest.mark.parametrize("sharing", ["shared", "split", "separate"])
def test_ibot_is_a_loop_over_patches(sharing):
    torch.manual_seed(0)
    objective = IBOT(
        SPEC,
        mask="m",
        out=9,
        patch_out=None if sharing == "shared" else 7,
        sharing=sharing,
        teacher_temperature=0.05,
        patch_temperature=0.06,
        patch_weight=0.7,
        cls_weight=1.3,
        **SIZES,
    )
    k = 9 if sharing == "shared" else 7
    objective.patch_centre_.copy_(randn(k, seed=8) / 10)
    feats, batch = given(objective)
    student, teacher, local = (feats[p] for p in objective.passes)
    hidden = student.mask.hidden.numpy()
    scores = numbers(objective.heads, student.patch, "patch")
    taught = numbers(objective.teacher, teacher.patch, "patch")
    targets = softmax((taught - objective.patch_centre_.numpy()) / 0.06)
    each = []
    for row in range(2 * IMAGES):
        errors = [ce(targets[row, n], scores[row, n]) for n in range(15) if hidden[row, n]]
        each.append(sum(errors) / max(len(errors), 1))
    assert 0.0 in each  # an image that hides nothing counts as well
    dino = DINO(SPEC, out=9, **SIZES, teacher_temperature=0.05)
    dino.head.load_state_dict(objective.heads.cls.state_dict())
    dino.teacher.load_state_dict(EmaCopy(objective.heads.cls).state_dict())
    names = dict(zip(dino.passes, (student, teacher, local), strict=True))
    loss, cls = objective(feats, batch, STEP), dino(names, batch, STEP)
    assert loss.logs["patch"].item() == pytest.approx(np.mean(each), rel=1e-5)
    assert loss.logs["cls"].item() == pytest.approx(cls.value.item(), rel=1e-5)
    total = 1.3 * cls.value.item() + 0.7 * np.mean(each)
    assert loss.value.item() == pytest.approx(total, rel=1e-5)
    seen = taught.reshape(-1, k).mean(0)
    expected = 0.9 * objective.patch_centre_.numpy() + 0.1 * seen
    np.testing.assert_allclose(loss.state["patch_centre_"].numpy(), expected, rtol=1e-4, atol=1e-6)


def test_the_centre_of_masked_patches_and_sinkhorn():
    torch.manual_seed(0)
    options = {"mask": "m", "out": 9, "sharing": "separate", **SIZES}
    masked = IBOT(SPEC, patch_centre="masked", **options)
    feats, batch = given(masked)
    student, teacher, _ = (feats[p] for p in masked.passes)
    taught = numbers(masked.teacher, teacher.patch[student.mask.hidden], "patch")
    loss = masked(feats, batch, STEP)
    np.testing.assert_allclose(loss.state["patch_centre_"], 0.1 * taught.mean(0), rtol=1e-4)
    balanced = IBOT(SPEC, targets="sinkhorn", **options)
    state = balanced(feats, batch, STEP).state
    assert not state["centre"].any()
    assert not state["patch_centre_"].any()


@pytest.mark.parametrize("targets", ["centre", "sinkhorn"])
def test_a_batch_that_hides_nothing(targets):
    objective = IBOT(
        SPEC, mask="m", out=9, sharing="separate", targets=targets, patch_centre="masked", **SIZES
    )
    feats, batch = given(objective)
    whole = torch.zeros(2 * IMAGES, 15, dtype=torch.bool)
    reads = objective.passes[0]
    feats[reads] = feats[reads]._replace(mask=Mask(whole, whole[:, None]))
    loss = objective(feats, batch, STEP)
    loss.value.backward()
    assert loss.logs["patch"] == 0
    assert loss.value.isfinite()
    assert loss.state["patch_centre_"].isfinite().all()
    for name, parameter in objective.heads.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, name


def test_the_two_centres_may_move_apart():
    def centres(**momenta: float) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        objective = IBOT(SPEC, mask="m", out=9, **SIZES, **momenta)
        return objective(*given(objective), STEP).state

    slow, fast = centres(centre_momentum=0.9), centres(centre_momentum=0.6)
    both = centres(centre_momentum=0.9, patch_centre_momentum=0.6)
    assert torch.equal(both["centre"], slow["centre"])
    assert torch.equal(both["patch_centre_"], fast["patch_centre_"])
    assert not torch.equal(fast["patch_centre_"], slow["patch_centre_"])
    still = centres(patch_centre_momentum=1.0)
    assert not still["patch_centre_"].any()


def test_a_teacher_that_shares():
    """Its one set of prototypes starts as the student's second and then follows the first."""
    objective = IBOT(SPEC, mask="m", out=9, sharing="split", teacher_shares=True, **SIZES)
    heads, teacher = objective.heads, objective.teacher.module
    x = randn(5, 12, seed=1)
    expected = numbers(heads, x, "patch")
    np.testing.assert_allclose(numbers(objective.teacher, x, "cls"), expected, rtol=1e-6)
    assert objective.teacher_kind == "cls"
    before = teacher.cls.last_layer.parametrizations.weight.original1.clone()
    objective.teacher.update(0.75)
    follows = heads.cls.last_layer.parametrizations.weight.original1
    found = teacher.cls.last_layer.parametrizations.weight.original1
    torch.testing.assert_close(found, 0.75 * before + 0.25 * follows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sharing": "shared", "patch_out": 5}, r"shared head has 9 .* patch_out 5"),
        ({"sharing": "shared", "teacher_shares": True}, r"teacher_shares is for a split head"),
        ({"sharing": "split", "patch_out": 5, "teacher_shares": True}, r"leave patch_out out"),
    ],
)
def test_heads_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        IBOT(SPEC, mask="m", out=9, **SIZES, **options)


def test_prototypes():
    torch.manual_seed(0)
    head = PrototypeHead(12, 9, **SIZES)
    x = randn(5, 12, seed=1)
    torch.testing.assert_close(head.embed(x).norm(dim=1), torch.ones(5))
    torch.testing.assert_close(head.last_layer.weight.norm(dim=1), torch.ones(9))
    assert head(x).abs().max() <= 1  # cosines
    length = head.last_layer.parametrizations.weight.original0
    assert length.shape == (9, 1)
    assert not length.requires_grad
    learned = PrototypeHead(12, 9, **SIZES, fixed_length=False)
    assert learned.last_layer.parametrizations.weight.original0.requires_grad


def test_separate_heads_share_nothing():
    heads = TokenHeads(12, 9, 7, sharing="separate", **SIZES, fixed_length=True)
    split = TokenHeads(12, 9, 7, sharing="split", **SIZES, fixed_length=True)
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(heads) - count(split) == count(heads.cls.mlp)


def test_koleo_sums_over_crops():
    objective = KoLeo(SPEC)
    feats, batch = given(objective)
    whole = objective(feats, batch, STEP).value
    (reads,) = objective.passes
    parts = []
    for crop in feats[reads].cls.chunk(2):
        alone = {reads: Tokens(crop[:, None], torch.zeros(IMAGES, 15, 12))}
        parts.append(objective(alone, batch, STEP).value)
    torch.testing.assert_close(whole, parts[0] + parts[1])
