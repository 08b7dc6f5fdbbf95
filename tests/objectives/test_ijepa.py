"""I-JEPA's loss, and which tokens it compares."""

import pytest
import torch

from contramask.masks import MultiblockMasking
from contramask.objectives.ijepa import IJEPA
from contramask.types import Batch, Spec, Step, Tokens
from tests.builders import randn

SPEC = Spec(dim=20, patch=4, grid=(5, 6), depth=2)
STEP = Step(2, 0.1)


def case(**changes):
    torch.manual_seed(0)
    objective = IJEPA(SPEC, mask="blocks", dim=16, depth=1, heads=2, **changes)
    masking = MultiblockMasking(SPEC, blocks=3, context=(0.6, 0.7), least=2)
    mask = masking.sample("blocks", 3, 2, STEP, "cpu")
    student = Tokens(randn(6, 0, 20), randn(6, mask.visible, 20, seed=1), mask)
    teacher = Tokens(randn(6, 0, 20), 3 + 2 * randn(6, 30, 20, seed=2))
    feats = dict(zip(objective.passes, (student, teacher), strict=True))
    views = {"mild": randn(2, 3, 3, 20, 24, seed=3)}
    return objective, feats, Batch(views=views, label=torch.zeros(3).long(), position=0)


@pytest.mark.parametrize(
    "options", [{}, {"normalise": False}, {"beta": 0.3}, {"normalise": False, "beta": 2.0}]
)
def test_loss_by_a_loop(options):
    objective, feats, batch = case(**options)
    student, teacher = feats.values()
    made, losses = {}, []
    objective.predictor.register_forward_hook(lambda _, args, out: made.update(out=out))
    found = objective(feats, batch, STEP).value.item()
    beta = options.get("beta", 1.0)
    for b in range(6):
        for t in range(3):
            for m, n in enumerate(student.mask.targets[b, t].nonzero().flatten()):
                h = teacher.patch[b, n].double()
                if options.get("normalise", True):
                    h = (h - h.mean()) / (h.var(unbiased=False) + 1e-5) ** 0.5
                apart = (made["out"][b, t, m].double() - h).abs()
                line, square = apart - beta / 2, apart.square() / (2 * beta)
                losses.append(torch.where(apart < beta, square, line).mean().item())
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_a_teacher_that_says_the_same_of_all_patches_has_no_spread():
    objective, feats, batch = case()
    assert objective(feats, batch, STEP).logs["spread"] > 0.5
    teacher = objective.passes[1]
    feats[teacher] = feats[teacher]._replace(patch=randn(20).expand(6, 30, 20))
    assert objective(feats, batch, STEP).logs["spread"] < 1e-5


def test_pictures_show_context_and_targets():
    objective, feats, batch = case()
    mask = feats[objective.passes[0]].mask
    shown = objective.picture(feats, batch, STEP)
    assert set(shown) == {"image", "context", "target 0", "target 1", "target 2"}
    for name, seen in {"context": ~mask.hidden, "target 2": mask.targets[:, 2]}.items():
        pixels = seen.unflatten(1, (5, 6)).repeat_interleave(4, 1).repeat_interleave(4, 2)
        assert torch.equal(shown[name] != 0, pixels[:, None].expand_as(shown[name]))
