"""Counted operations against torch's own counter, on real passes of real networks."""

from functools import partial
from types import SimpleNamespace

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from contramask.masks import RandomMasking, UnitMasking
from contramask.models.vit import VisionTransformer
from contramask.objectives.mae import MAE
from contramask.objectives.moco import MoCoV3
from contramask.objectives.simmim import SimMIM
from contramask.training.flops import (
    Planned,
    StepFlops,
    patch_embed_flops,
    peak_flops,
    vit_forward_flops,
)
from contramask.training.pretraining import Pretraining
from contramask.types import Batch, Step

B, DIM, DEPTH, HEADS, PATCH, SIZE = 3, 24, 2, 3, 4, (16, 20)


@given(
    dim=st.sampled_from([12, 24]),
    depth=st.integers(1, 3),
    rows=st.integers(1, 4),
    columns=st.integers(1, 5),
    ratio=st.sampled_from([2.0, 4.0]),
)
def test_the_closed_form_is_what_torch_counts(dim, depth, rows, columns, ratio):
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=(rows * 5, columns * 5), patch_size=5, embed_dim=dim,
        depth=depth, num_heads=3, mlp_ratio=ratio, num_classes=0,
    )  # fmt: skip
    # torch 2.11 does not count fused attention on a CPU.
    plain = sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), plain, FlopCounterMode(display=False) as counter:
        vit(torch.zeros(2, 3, rows * 5, columns * 5))
    patches = rows * columns
    blocks = vit_forward_flops(dim=dim, depth=depth, tokens=patches + 1, mlp_ratio=ratio)
    embed = patch_embed_flops(dim=dim, patch=5, patches=patches)
    assert counter.get_total_flops() == 2 * (blocks + embed)


def test_the_published_cost_of_vit_base():
    # 17.6 G multiplications and additions at 224 pixels with 16-pixel patches (arXiv:2012.12877).
    flops = vit_forward_flops(dim=768, depth=12, tokens=197)
    flops += patch_embed_flops(dim=768, patch=16, patches=196)
    assert flops / 2 == pytest.approx(17.5e9, rel=0.01)


def backbone(**given):
    sizes = {"embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, **given}
    return VisionTransformer("vit_tiny_patch16_224", img_size=SIZE, patch_size=PATCH, timm=sizes)


def batch(**crops: int) -> Batch:
    views = {name: torch.randn(v, B, 3, *SIZE) for name, v in crops.items()}
    return Batch(views=views, label=torch.zeros(B, dtype=torch.long), position=0)


def both_counts(module: Pretraining, given: Batch) -> tuple[int, int]:
    """Ours and torch's, of the same forward and backward."""
    step = Step(0, 0.0)
    with sdpa_kernel(SDPBackend.MATH):  # its backward has no recomputation
        with StepFlops(module) as meter, FlopCounterMode(display=False) as counter:
            feats = module.encode(given, step)
            losses = [term(feats, given, step).value for term in module.terms.values()]
            torch.stack(losses).sum().backward()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    return meter.total(given), counter.get_total_flops()


def test_mae_with_registers_drops_tokens_and_decodes():
    module = Pretraining(
        backbone(reg_tokens=2),
        {"mae": partial(MAE, mask="random", view="mild", dim=16, depth=2, heads=2)},
        masks={"random": partial(RandomMasking, ratio=0.7)},
    )
    assert isinstance(module, Planned)
    ours, torchs = both_counts(module, batch(mild=1))
    assert ours == torchs


def test_moco_counts_the_teacher_once_and_frozen_patches_less():
    module = Pretraining(
        VisionTransformer(
            "vit_tiny_patch16_224",
            img_size=SIZE,
            patch_size=PATCH,
            freeze_patch_embed=True,
            timm={"embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS},
        ),
        {"moco": partial(MoCoV3, hidden=32, out=16)},
    )
    ours, torchs = both_counts(module, batch(**{next(iter(module.plan)).view: 2}))
    assert ours == pytest.approx(torchs, rel=1e-3)


def test_passes_that_share_a_forward_are_counted_once():
    def of(*layers: int | None) -> float:
        terms = {
            f"at {i}": partial(SimMIM, mask="blocks", view="mild", layer=layer)
            for i, layer in enumerate(layers)
        }
        masks = {"blocks": partial(UnitMasking, unit=4, ratio=0.6)}
        return both_counts(Pretraining(backbone(), terms, masks=masks), batch(mild=1))[0]

    one, three = of(None), of(None, 0, 1)
    heads = 3 * 2 * DIM * 3 * PATCH**2  # of a token: forward and two products back
    assert 0 < three - one < 4 * heads * B * (SIZE[0] // PATCH) * (SIZE[1] // PATCH)


def test_a_hybrid_sums_its_passes():
    module = Pretraining(
        backbone(),
        {
            "moco": partial(MoCoV3, hidden=32, out=16),
            "simmim": partial(SimMIM, mask="blocks", view="mild"),
        },
        masks={"blocks": partial(UnitMasking, unit=4, ratio=0.6)},
    )
    views = {reads.view: 2 for reads in module.plan} | {"mild": 1}
    ours, torchs = both_counts(module, batch(**views))
    assert ours == pytest.approx(torchs, rel=1e-3)


class Looking(nn.Module):
    """An objective that also looks at its own head without a gradient."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 7)

    def forward(self, feats, batch, step):
        with torch.no_grad():
            self.head(torch.zeros(2, 5))
        return self.head(torch.zeros(3, 5))


def test_layers_without_gradient_count_once_and_those_with_for_their_weights():
    objective = Looking()
    module = SimpleNamespace(
        objectives=nn.ModuleDict({"x": objective}), plan={}, backbone=nn.Identity()
    )
    with StepFlops(module) as meter:
        objective({}, {}, None)
    assert meter.heads == 2 * 5 * 7 * (2 + 3 * 2)


def test_counting_changes_no_number():
    outcomes = []
    for counted in (False, True):
        torch.manual_seed(3)
        module = Pretraining(
            backbone(drop_path_rate=0.3),
            {"mae": partial(MAE, mask="random", view="mild", dim=16, depth=1, heads=2)},
            masks={"random": partial(RandomMasking, ratio=0.7)},
        )
        given, step = batch(mild=1), Step(0, 0.0)
        meter = StepFlops(module)
        if counted:
            meter.__enter__()
        loss = module.terms["mae"](module.encode(given, step), given, step).value
        loss.backward()
        meter.__exit__(None, None, None)
        gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None]
        outcomes.append([loss.detach(), *gradients, torch.random.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@pytest.mark.parametrize(
    ("name", "bf16", "fp16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12, 989.4e12),
        ("NVIDIA H100 PCIe", 756e12, 756e12),
        ("NVIDIA H100 NVL", 835.5e12, 835.5e12),
        ("NVIDIA H200", 989.4e12, 989.4e12),
        ("NVIDIA L40S", 362.1e12, 362.1e12),
        ("NVIDIA L4", 121e12, 121e12),
        ("Tesla V100-SXM2-16GB", None, 125e12),
        ("Tesla V100-PCIE-16GB", None, 112e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA A10G", None, None),
        ("Some New GPU", None, None),
    ],
)
def test_peaks_are_found_by_the_names_drivers_give(name, bf16, fp16):
    assert peak_flops(name, torch.bfloat16) == bf16
    assert peak_flops(name, torch.float16) == fp16


def test_float32_is_tf32_where_that_is_allowed(monkeypatch):
    name = "NVIDIA A100-SXM4-80GB"
    assert peak_flops(name, torch.float32) == 19.5e12
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops(name, torch.float32) == 156e12
    assert peak_flops("Tesla V100-SXM2-16GB", torch.float32) == 15.7e12


def test_no_peak_of_cpus_and_odd_types():
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float64) is None
