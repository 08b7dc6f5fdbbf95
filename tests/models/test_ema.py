"""Teachers: what is averaged, what stays silent, and who they follow."""

import copy

import torch
from timm.layers import DropPath
from torch import nn

from contramask.models.ema import EmaCopy
from tests.builders import randn


def source() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 7, bias=False),
        nn.BatchNorm1d(7),
        nn.Dropout(0.5),
        DropPath(0.5),
        nn.Linear(7, 3),
    )


def moved(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.add_(randn(*p.shape, seed=i))
    return module


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters()}


def test_update_against_a_loop():
    student = source()
    teacher = EmaCopy(student)
    before, after = values(teacher.module), values(moved(student))
    teacher.update(0.7)
    for name, found in values(teacher.module).items():
        torch.testing.assert_close(found, 0.7 * before[name] + 0.3 * after[name])


def test_momentum_one_keeps_and_zero_copies():
    student = source()
    teacher = EmaCopy(student)
    before = values(teacher.module)
    moved(student)
    teacher.update(1.0)
    assert all(torch.equal(v, before[n]) for n, v in values(teacher.module).items())
    teacher.update(0.0)
    assert all(torch.equal(v, student.get_parameter(n)) for n, v in values(teacher.module).items())


def test_it_starts_equal_frozen_and_apart():
    student = source()
    teacher = EmaCopy(student)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}
    # The source is referred to and not registered: nothing is saved or trained twice.
    assert set(teacher.state_dict()) == {f"module.{k}" for k in student.state_dict()}
    teacher.eval()
    student.eval()
    x = randn(4, 5)
    assert torch.equal(teacher(x), student(x))
    assert not teacher(x).requires_grad


def test_dropout_is_silent_and_batch_norm_follows():
    teacher, x = EmaCopy(source()), randn(4, 5)
    for _ in range(2):  # train() after eval(), as validation does
        teacher.eval().train()
        kinds = {type(m).__name__: m.training for m in teacher.module.modules()}
        assert kinds.pop("BatchNorm1d")
        assert not any(kinds.values())
    assert torch.equal(teacher(x), teacher(x))
    norm = teacher.module[1]
    assert norm.running_mean.any()  # statistics of its own
    teacher.eval()
    before = norm.running_mean.clone()
    teacher(x + 1)
    assert torch.equal(norm.running_mean, before)


def test_buffers_are_not_averaged():
    student = source()
    teacher = EmaCopy(student)
    student.train()(randn(6, 5) + 3)
    teacher.update(0.0)
    assert not teacher.module[1].running_mean.any()


def test_made_of_a_module_in_eval_mode_it_is_in_eval_mode():
    assert not EmaCopy(source().eval()).module[1].training


def test_a_copied_whole_has_a_teacher_of_its_own():
    whole = nn.ModuleDict({"student": source()})
    whole["teacher"] = EmaCopy(whole["student"])
    twin = copy.deepcopy(whole)
    before = values(whole["teacher"])
    moved(twin["student"])
    twin["teacher"].update(0.0)
    assert torch.equal(twin["teacher"].module[0].weight, twin["student"][0].weight)
    assert all(torch.equal(v, before[n]) for n, v in values(whole["teacher"]).items())


def test_it_follows_converted_batch_norm():
    """Synchronised batch norm replaces modules of the student after the teacher was made."""
    whole = nn.ModuleDict({"student": source()})
    whole["teacher"] = EmaCopy(whole["student"])
    whole = nn.SyncBatchNorm.convert_sync_batchnorm(whole)
    moved(whole["student"])
    whole["teacher"].update(0.0)
    whole.train()
    norm = whole["teacher"].module[1]
    assert isinstance(norm, nn.SyncBatchNorm)
    assert norm.training
    assert torch.equal(norm.weight, whole["student"][1].weight)
