"""Every objective keeps the promises of `Objective`, on random tokens and without a network."""

import importlib
import inspect
import pkgutil

import pytest
import torch

import contramask.objectives
from contramask.masks import RandomMasking
from contramask.models.ema import EmaCopy
from contramask.models.tokenizers.patches import PatchTokenizer
from contramask.objectives.objective import Objective
from contramask.types import Batch, Pass, Spec, Step, Tokens, UserError
from tests.builders import randn

SPEC = Spec(dim=20, patch=4, grid=(3, 5), depth=2)
SMALL = {"hidden": 28, "out": 12, "dim": 16, "depth": 1, "heads": 2, "cell": 2, "window": 4}
COMPARE_IMAGES = {"CMAEContrast", "MoCoV3", "SimCLR", "KoLeo"}  # within a batch
STEP, IMAGES, REGISTERS = Step(7, 0.3, seed=1), 5, 2


def find() -> list[type[Objective]]:
    found = set()
    for module in pkgutil.walk_packages(contramask.objectives.__path__, "contramask.objectives."):
        for kind in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(kind) and issubclass(kind, Objective):
                found |= set() if inspect.isabstract(kind) else {kind}
    return sorted(found, key=lambda kind: kind.__name__)


def build(kind: type[Objective]) -> Objective:
    torch.manual_seed(0)
    takes = inspect.signature(kind).parameters
    arguments = {k: v for k, v in SMALL.items() if k in takes}
    if "tokenizer" in takes:
        arguments |= {"tokenizer": PatchTokenizer(randn(11, 12).sigmoid()), "vocabulary": 11}
    needed = [p.name for p in takes.values() if p.default is p.empty and p.name != "spec"]
    return kind(SPEC, **arguments, **{name: "hide" for name in needed if name == "mask"})


def crops_of(objective: Objective) -> dict[str, int]:
    """The smallest number of crops per view that it accepts."""
    views = dict.fromkeys(p.view for p in objective.passes)
    for number in range(1, 12):
        crops = dict.fromkeys(views, number)
        try:
            objective.check(crops, IMAGES)
        except UserError:
            continue
        return crops
    raise AssertionError(f"{type(objective).__name__} accepts no number of crops")


def tokens_of(reads: Pass, crops: int, *, fill: bool, images: int = IMAGES) -> Tokens:
    """What a backbone of random numbers would give; a teacher's are watched for gradients too."""
    rows, mask, n = crops * images, None, SPEC.patches
    if reads.mask is not None:
        masking = RandomMasking(SPEC, ratio=0.6, fill=fill)
        mask = masking.sample(reads.mask, images, crops, STEP, "cpu")
        n = n if fill else masking.visible
    seed = len(str(reads))
    prefix = randn(rows, 1 + REGISTERS, 20, seed=seed).requires_grad_()
    patch = randn(rows, n, 20, seed=seed + 1).requires_grad_()
    layers = {i: randn(rows, 1 + REGISTERS + n, 20, seed=i) for i in reads.layers}
    return Tokens(prefix, patch, mask, layers)


class Case:
    """An objective with everything it reads."""

    def __init__(self, kind: type[Objective]):
        self.objective, self.kind = build(kind), kind
        self.crops = crops_of(self.objective)
        self.batch = Batch(
            views={k: randn(v, IMAGES, 3, 12, 20, seed=v) for k, v in self.crops.items()},
            label=torch.full((IMAGES,), -1),
            position=0,
        )
        for fill in (False, True):  # some masks drop, some fill: the wrong kind is refused
            self.feats = {
                p: tokens_of(p, self.crops[p.view], fill=fill) for p in self.objective.passes
            }
            try:
                self.loss()
            except UserError:
                continue
            return
        raise AssertionError(f"{kind.__name__} takes neither masks that drop nor such that fill")

    def loss(self):
        return self.objective(self.feats, self.batch, STEP)


@pytest.fixture(params=find(), ids=lambda kind: kind.__name__)
def case(request) -> Case:
    return Case(request.param)


def test_all_are_found():
    assert {"MAE", "MoCoV3", "SimCLR", "SimMIM"} <= {kind.__name__ for kind in find()}


def test_it_is_final(case):
    assert Objective in case.kind.__bases__
    assert next(iter(inspect.signature(case.kind).parameters)) == "spec"


def test_a_finite_scalar(case):
    loss = case.loss()
    assert loss.value.shape == ()
    assert loss.value.dtype == torch.float32
    assert loss.value.isfinite()
    for value in loss.logs.values():
        assert value.shape == ()
        assert not value.requires_grad


def test_gradients(case):
    case.loss().value.backward()
    averages = [m for m in case.objective.modules() if isinstance(m, EmaCopy)]
    frozen = {id(p) for m in averages for p in m.parameters()}
    for name, parameter in case.objective.named_parameters():
        if id(parameter) in frozen or not parameter.requires_grad:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, f"{name} has no gradient: DDP would stop"
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
    for reads, tokens in case.feats.items():
        reached = [t.grad is not None for t in (tokens.prefix, tokens.patch)]
        assert any(reached) == (reads.net == "student"), str(reads)


def test_the_same_twice(case):
    assert torch.equal(case.loss().value, case.loss().value)


def test_tokens_in_bfloat16(case):
    exact = case.loss().value.item()
    case.feats = {
        p: t._replace(prefix=t.prefix.bfloat16(), patch=t.patch.bfloat16())
        for p, t in case.feats.items()
    }
    with torch.autocast("cpu", torch.bfloat16):
        found = case.loss().value
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact, rel=2e-2)


def test_images_are_what_it_averages_over(case):
    """Images in another order give the same loss: the mean has no favourites."""
    before, order = case.loss().value, torch.tensor([3, 0, 4, 1, 2])

    def permuted(x, crops):
        return x.unflatten(0, (crops, IMAGES))[:, order].flatten(0, 1)

    for reads, t in case.feats.items():
        crops, mask = case.crops[reads.view], t.mask
        if mask is not None:
            hidden = permuted(mask.hidden, crops)
            mask = mask._replace(hidden=hidden, targets=permuted(mask.targets, crops))
        prefix, patch = permuted(t.prefix, crops), permuted(t.patch, crops)
        layers = {i: permuted(x, crops) for i, x in t.layers.items()}
        case.feats[reads] = Tokens(prefix, patch, mask, layers)
    case.batch["views"] = {k: v[:, order] for k, v in case.batch["views"].items()}
    torch.testing.assert_close(case.loss().value, before, rtol=1e-4, atol=1e-6)


def test_a_missing_view_is_named(case):
    with pytest.raises(UserError, match=r"reads view '\w+'; data.views has other; add it there"):
        case.objective.check({"other": 2}, IMAGES)
    with pytest.raises(UserError, match=r"data.views has none"):
        case.objective.check({}, IMAGES)


def test_it_needs_the_crops_it_compares(case):
    needed = max(case.crops.values())
    if needed == 1:
        case.objective.check(dict.fromkeys(case.crops, 3), IMAGES)  # any number
        return
    for number in (1, needed + 1):
        with pytest.raises(UserError, match=rf"{needed} crops.*has {number}; set data.views.\w+"):
            case.objective.check(dict.fromkeys(case.crops, number), IMAGES)


def test_it_needs_the_images_it_compares(case):
    if case.kind.__name__ not in COMPARE_IMAGES:
        case.objective.check(case.crops, 1)
        return
    message = r"at least 2 images per device, given 1; set data.batch_size"
    with pytest.raises(UserError, match=message):
        case.objective.check(case.crops, 1)


def test_the_wrong_kind_of_mask_is_refused(case):
    masked = [p for p in case.objective.passes if p.mask is not None]
    if not masked:
        pytest.skip("reads no masked pass")
    drops = case.feats[masked[0]].patch.shape[1] < SPEC.patches
    case.feats = {p: tokens_of(p, case.crops[p.view], fill=drops) for p in case.objective.passes}
    with pytest.raises(UserError, match=r"set model.masks.NAME.init_args.fill: (true|false)"):
        case.loss()


def test_pictures_are_images(case):
    for picture in case.objective.picture(case.feats, case.batch, STEP).values():
        assert picture.shape[1:] == (3, 12, 20)
        assert picture.isfinite().all()
