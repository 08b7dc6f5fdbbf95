"""Linear probing on augmented views by the official protocols, as named presets.

Beside each number is where the authors' code has it; `differs` says what their code does and this
one does not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from contramask.probes.features import Feature
from contramask.probes.linear_recipe import LinearRecipe
from contramask.types import Spec, UserError

Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class LinearPreset:
    """A protocol of linear probing on augmented views.

    The views are random resized crops of area 0.08 to 1 and shape 3/4 to 4/3, mirrored every other
    time; val is resized to 8/7 of the crop, whose centre is cut (256 and 224 in all protocols).

    Attributes:
        source: the paper, and the file of the authors' code.
        recipe: rates, epochs, batch over all ranks and accumulation, schedule, start.
        features: what the heads of a backbone of these sizes read; one group of heads for each.
        train: interpolation of the crop.
        val: interpolation of the resize.
        differs: what the authors' code does otherwise.
    """

    source: str
    recipe: LinearRecipe
    features: Callable[[Spec], tuple[Feature, ...]]
    train: Interpolation
    val: Interpolation
    differs: tuple[str, ...]


def class_token(spec: Spec) -> tuple[Feature, ...]:
    """The class token after the final norm."""
    return (Feature("last", "cls", "final"),)


def by_width(spec: Spec) -> tuple[Feature, ...]:
    """Below 768 dimensions (ViT-S) the class tokens of the last four blocks, each normed.

    From 768 on (ViT-B, ViT-L) the class token and the mean of the patches of the last one. A
    backbone of fewer than four blocks has all of them read.
    """
    if spec.dim < 768:
        return (Feature(f"last{min(4, spec.depth)}", "cls", "final"),)
    return (Feature("last", "cls+mean", "final"),)


def one_and_four(spec: Spec) -> tuple[Feature, ...]:
    """The last and the last four blocks, each without and with the mean of the last patches."""
    four = f"last{min(4, spec.depth)}"
    return tuple(Feature(s, p, "final") for s in ("last", four) for p in ("cls", "cls+mean"))


def every_block(spec: Spec) -> tuple[Feature, ...]:
    """Class token and mean of the patches of each block as it comes, without a norm."""
    return tuple(Feature(f"block_{i:02d}", "cls+mean", "none") for i in range(spec.depth))


def two_thirds(spec: Spec) -> tuple[Feature, ...]:
    """Mean of the patches of the 8th of 12 blocks as it comes, without a norm."""
    return (Feature(f"block_{max(1, round(spec.depth * 8 / 12)) - 1:02d}", "mean", "none"),)


_BEST_EPOCH = "the best epoch on val is reported, not the last"
_ON_VAL = "rates are chosen on val"
_LAYERS_ON_VAL = "the block is chosen on val"
_INTERLEAVED = "the two halves of a ViT-B's feature are interleaved, which no linear layer sees"
_OWN_DRAWS = "heads start from draws of their own"
_SHORT_BATCH = "an epoch ends with a batch of what is left"

_MAE = LinearRecipe(
    rates=(0.1,),  # --blr 0.1, x 16384/256 = 6.4
    epochs=90,  # --epochs 90
    batch=16384,  # 512 x 8 GPUs x 4 nodes
    optimiser="lars",  # util/lars.py: trust coefficient 0.001, none for biases
    momentum=0.9,
    warmup=10 / 90,  # --warmup_epochs 10; util/lr_sched.py, cosine at every step
    batch_norm=True,  # BatchNorm1d(affine=False, eps=1e-6)
)
_DIFFERS_MAE = (
    "batch statistics are of each GPU's rows, not of the whole batch",
    "statistics for val are a moving average (0.1), not that of all batches",
    "biases start uniform in +-1/sqrt(F), not at zero",
    "a crop that leaves the image is cut short, not drawn again (up to ten times)",
    _BEST_EPOCH,
)
_COSINE_SGD = LinearRecipe(
    rates=(0.001,),  # eval_linear.py: --lr 0.001, x 1024/256
    epochs=100,  # --epochs 100
    batch=1024,  # 128 x 8 GPUs
    optimiser="sgd",
    momentum=0.9,
    warmup=0.0,
    batch_norm=False,
    weight_decay=0.0,
    per_epoch=True,  # CosineAnnealingLR(epochs), one step an epoch
    init_std=0.01,  # normal, biases 0
)


def _sgd(**changes: object) -> LinearRecipe:
    return LinearRecipe(**{**vars(_COSINE_SGD), **changes})  # pyright: ignore[reportArgumentType]


_BEIT = _sgd(optimiser="adamw", weight_decay=1e-4)  # AdamW(lr, weight_decay=1e-4)

PRESETS = {
    "mae": LinearPreset(
        source="arXiv:2111.06377, main_linprobe.py, ViT-B",
        recipe=_MAE,
        features=class_token,
        train="bicubic",
        val="bicubic",
        differs=_DIFFERS_MAE,
    ),
    "mae-large": LinearPreset(
        source="arXiv:2111.06377, main_linprobe.py, ViT-L and ViT-H",
        recipe=LinearRecipe(**{**vars(_MAE), "epochs": 50, "warmup": 10 / 50}),  # --epochs 50
        features=class_token,
        train="bicubic",
        val="bicubic",
        differs=_DIFFERS_MAE,
    ),
    "mocov3": LinearPreset(
        source="arXiv:2104.02057, main_lincls.py",
        recipe=_sgd(rates=(3.0,), epochs=90),  # --lr 3, x 1024/256 = 12
        features=class_token,
        train="bilinear",  # torchvision's default, in both transforms
        val="bilinear",
        differs=(_SHORT_BATCH, _BEST_EPOCH),
    ),
    "dino": LinearPreset(
        source="arXiv:2104.14294, eval_linear.py",
        recipe=_COSINE_SGD,
        features=by_width,  # --n_last_blocks 4; 1 and --avgpool_patchtokens true for ViT-B
        train="bilinear",
        val="bicubic",  # interpolation=3
        differs=(_INTERLEAVED, _SHORT_BATCH, _BEST_EPOCH),
    ),
    "ibot": LinearPreset(
        source="arXiv:2111.07832, eval_linear_multi.py --sweep_lr_only",
        recipe=_sgd(rates=tuple(float(f"{n}e{k}") for k in range(-4, 1) for n in range(1, 10))),
        features=by_width,  # --n_last_blocks 4; 1 and --avgpool_patchtokens 2 for ViT-B and ViT-L
        train="bilinear",
        val="bicubic",
        differs=(_ON_VAL, _OWN_DRAWS, _SHORT_BATCH, _BEST_EPOCH),
    ),
    "dinov2": LinearPreset(
        source="arXiv:2304.07193, dinov2/eval/linear.py",
        recipe=_sgd(
            rates=(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1),
            epochs=10,  # of 1250 steps, whatever the number of images
            per_epoch=False,  # CosineAnnealingLR(max_iter)
        ),
        features=one_and_four,
        train="bicubic",
        val="bicubic",
        differs=(_ON_VAL, _OWN_DRAWS, "an epoch is 1250 steps of 1024 images"),
    ),
    "beit": LinearPreset(
        source="arXiv:2106.08254, beit/run_linear_eval.py",
        recipe=_BEIT,  # 0.001 x 1024/256: --lr 4e-3, which its script takes as it is
        features=every_block,
        train="bilinear",
        val="bicubic",
        differs=(
            _LAYERS_ON_VAL,
            _OWN_DRAWS,
            _SHORT_BATCH,
            _BEST_EPOCH,
            "--lr 4e-3 is not scaled to the batch",
        ),
    ),
    "simmim-like": LinearPreset(
        source="arXiv:2111.09886, whose code has no linear probe; the feature is as its authors "
        "told (8th of 12 blocks, mean of the patches), all else is that of BEiT",
        recipe=_BEIT,
        features=two_thirds,
        train="bilinear",
        val="bicubic",
        differs=("its settings are not published",),
    ),
}


def preset_of(name: str) -> LinearPreset:
    """A preset by its name. Raises `UserError` if there is none."""
    if name not in PRESETS:
        raise UserError(
            f"linear probe: preset is {name!r}; there are {', '.join(PRESETS)}; set --preset"
        )
    return PRESETS[name]
