"""One module for all recipes: every pass once, weights, logs, clipping, pictures."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch

from contramask.models.heads import BlockReader
from contramask.objectives.simmim import SimMIM
from contramask.optim import Optim
from contramask.schedule import Schedule
from contramask.training.pretraining import Pretraining
from contramask.types import Spec, Step, UserError
from tests.builders import (
    MASKS,
    RECIPES,
    Losses,
    fit,
    pretraining,
    tiny_vit,
    toy_batch,
)


class Gradients(pl.Callback):
    """Gradients as backward left them, before clipping."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.found = {
            n: None if p.grad is None else p.grad.clone() for n, p in pl_module.named_parameters()
        }


class Logged(pl.Callback):
    """What was logged, step by step."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.rows.append({k: v.item() for k, v in trainer.callback_metrics.items()})


def count_forwards(module: Pretraining) -> dict[str, int]:
    counts = {"student": 0, "teacher": 0}

    def count(net):
        def hook(*_):
            counts[net] += 1

        return hook

    module.backbone.register_forward_hook(count("student"))
    if module.teacher is not None:
        module.teacher.register_forward_hook(count("teacher"))
    return counts


@pytest.mark.parametrize(
    ("recipe", "student", "teacher"),
    [
        ("moco", 1, 1),
        ("simclr", 1, 0),
        ("mae", 1, 0),
        ("simmim", 1, 0),
        ("hybrid", 2, 1),  # two masks: two forwards
        ("hybrid_shared", 1, 1),  # one mask, by its name: one forward
        ("hybrid_layered", 1, 1),  # also where one of them reads an earlier block
        ("dino", 2, 1),
        ("dinov2", 2, 1),
    ],
)
def test_every_pass_is_computed_once(recipe, student, teacher):
    module = pretraining(recipe)
    counts = count_forwards(module)
    fit(module, steps=3)
    assert counts == {"student": 3 * student, "teacher": 3 * teacher}
    assert (module.teacher is not None) == (teacher > 0)


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_trained_parameter_gets_a_gradient(recipe):
    """One without would stop distributed training."""
    module, gradients = pretraining(recipe), Gradients()
    fit(module, steps=1, callbacks=[gradients])
    for name, parameter in module.named_parameters():
        assert (gradients.found[name] is not None) == parameter.requires_grad, name


def test_an_earlier_block_trains_what_is_before_it():
    """Reconstruction from block 0 of 2 leaves block 1 to the contrast alone."""
    module = pretraining("hybrid_layered", weights={"contrast": 0.0, "masked": 1.0})
    gradients = Gradients()
    fit(module, steps=1, callbacks=[gradients])
    for name, gradient in gradients.found.items():
        if name.startswith("backbone.vit.blocks."):
            assert bool(gradient.any()) == name.startswith("backbone.vit.blocks.0."), name


def test_what_a_layered_objective_reads():
    """The block's output, un-normed by the backbone, through a norm of its own."""
    module = pretraining("hybrid_layered").eval()
    batch = toy_batch(0, 4)
    feats = module.encode(batch, Step(0, 0.0))
    objective = module.terms["masked"]
    tokens = feats[objective.passes[0]]
    vit = module.backbone.vit
    seen = []
    vit.blocks[0].register_forward_hook(lambda m, i, out: seen.append(out))
    module.backbone(batch["views"]["global"].flatten(0, 1), tokens.mask, module.masks["units"].fill)
    expected = torch.nn.functional.layer_norm(seen[0], (24,), eps=1e-6)
    found = objective.read(tokens)
    torch.testing.assert_close(torch.cat([found.prefix, found.patch], 1), expected)


def test_layers_that_leave_blocks_untrained_are_refused():
    one = {"masked": partial(SimMIM, mask="units", layer=0)}
    with pytest.raises(UserError, match=r"all objectives read earlier blocks.*layer out"):
        Pretraining(tiny_vit(), one, masks={"units": MASKS["units"]})
    with pytest.raises(UserError, match=r"layer is 2, the backbone has blocks 0 to 1"):
        Pretraining(tiny_vit(), {"masked": partial(SimMIM, mask="units", layer=2)})


@pytest.mark.parametrize(("layer", "block"), [(0.5, 5), (0.01, 0), (0.99, 11), (0, 0), (11, 11)])
def test_a_layer_may_be_a_fraction_of_the_depth(layer, block):
    spec = Spec(dim=6, patch=4, grid=(2, 3), depth=12)
    assert BlockReader(spec, layer).layers == (block,)
    with pytest.raises(UserError, match=r"layer is 12, the backbone has blocks 0 to 11"):
        BlockReader(spec, 12)


def test_masks_of_one_name_are_shared_between_passes_of_a_view():
    module = pretraining("hybrid_shared")
    feats = module.encode(toy_batch(0, 4), Step(0, 0.0))
    first, second = (module.terms[name].passes[0] for name in ("contrast", "masked"))
    assert feats[first] is feats[second]
    module = pretraining("hybrid")
    feats = module.encode(toy_batch(0, 4), Step(0, 0.0))
    assert [p.net for p in feats] == ["teacher", "student", "student"]


def test_the_sum_follows_the_weights():
    weights = {"contrast": Schedule(peak=1.0, end=0.0, shape="linear"), "masked": 0.5}
    losses, logged = Losses(), Logged()
    fit(
        pretraining("hybrid", weights=weights),
        steps=4,
        callbacks=[losses, logged],
        log_every_n_steps=1,
    )
    for i, (total, terms) in enumerate(zip(losses.total, losses.terms, strict=True)):
        expected = (1 - i / 4) * terms["contrast"] + 0.5 * terms["masked"]
        assert total == pytest.approx(expected, rel=1e-6)
        assert logged.rows[i]["train/weight/contrast"] == pytest.approx(1 - i / 4)
        assert logged.rows[i]["train/loss"] == pytest.approx(total)
        assert logged.rows[i]["train/loss/masked"] == pytest.approx(terms["masked"])


def test_a_term_of_weight_zero_changes_nothing_and_still_has_gradients():
    """Nor does it move the drop path of the other, whose name has not changed."""
    alone, beside, gradients = Losses(), Losses(), Gradients()
    one = pretraining("simmim", drop_path=0.3)
    two = pretraining("hybrid", drop_path=0.3, weights={"contrast": 0.0, "masked": 1.0})
    two.objectives["masked"].load_state_dict(one.objectives["masked"].state_dict())
    two.masks.load_state_dict(one.masks.state_dict())
    fit(one, callbacks=[alone])
    fit(two, callbacks=[beside, gradients])
    assert alone.total == beside.total
    heads = {n: g for n, g in gradients.found.items() if "projector" in n and "teacher" not in n}
    assert len(heads) == 7
    assert not any(g.any() for g in heads.values())


def test_logs():
    logged = Logged()
    optim = Optim(lr=Schedule(peak=0.4, shape="linear"), batch=8, decay=0.1)
    module = pretraining("hybrid", optim=optim, momentum=Schedule(peak=0.9, end=1.0))
    fit(module, steps=4, log_every_n_steps=2, accumulate_grad_batches=3, callbacks=[logged])
    assert logged.rows[0] == {}  # the first update is not a second one
    found = logged.rows[-1]
    assert set(found) == {
        *(f"train/{k}" for k in ("loss", "loss/contrast", "loss/masked")),
        *(f"train/{k}" for k in ("weight/contrast", "weight/masked", "contrast/similarity")),
        *(f"optim/{k}" for k in ("lr", "weight_decay", "grad_norm", "ema_momentum")),
    }
    # The fourth update of four: progress 3 / 4; 4 images x 3 micro-batches for a batch of 8.
    assert found["optim/lr"] == pytest.approx(0.1 * 12 / 8)
    assert found["optim/weight_decay"] == pytest.approx(0.1)
    assert 0.9 < found["optim/ema_momentum"] < 1


@pytest.mark.parametrize("clip", [None, 0.01])
def test_clipping(clip):
    """Plain descent with rate 1 and no momentum moves weights by the clipped gradient."""
    optim = Optim(name="sgd", lr=1.0, batch=None, decay=0.0, betas=(0.0, 0.0), rules=[], clip=clip)
    module, gradients, logged = pretraining("simmim", optim=optim), Gradients(), Logged()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    fit(module, steps=1, callbacks=[gradients, logged], log_every_n_steps=1)
    norm = sum(g.square().sum() for g in gradients.found.values()).sqrt()
    assert norm > 0.01
    assert logged.rows[0]["optim/grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    scale = 1.0 if clip is None else clip / norm
    for name, parameter in module.named_parameters():
        expected = before[name] - scale * gradients.found[name]
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-7)


def test_description():
    module = pretraining("hybrid")
    assert "0.0 M trained parameters" in module.describe()
    assert "pass student · mild · masked by units" in module.describe()
    assert "loss contrast: MoCoV3" in module.describe()


def test_pictures():
    module = pretraining("hybrid")
    trainer = fit(module, steps=2)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    assert trainer.global_step == 2
    shown = module.inspect(toy_batch(8, 4), images=3)
    assert set(shown) == {"views", "masked"}
    locals_ = {f"local {i}" for i in range(3)}
    assert set(shown["views"]) == {"global 0", "global 1", "mild 0", "shifted 0"} | locals_
    assert set(shown["masked"]) == {"image", "masked", "reconstruction"}
    for name, picture in (shown["views"] | shown["masked"]).items():
        assert picture.shape == ((3, 3, 8, 12) if name in locals_ else (3, 3, 16, 20))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_a_backbone_without_class_token_takes_masked_recipes():
    backbone = tiny_vit(timm={"class_token": False, "global_pool": ""})
    losses = Losses()
    masks = {"random": MASKS["random"]}
    fit(Pretraining(backbone, RECIPES["mae"], masks=masks), callbacks=[losses])
    assert all(x > 0 for x in losses.total)
