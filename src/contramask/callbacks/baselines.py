"""What objectives would show if nothing were learned: what losses are to be held against."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from contramask.callbacks.diagnoses import CHANCE, RANK, STD, Codes, Facts
from contramask.functional.patches import patchify
from contramask.functional.spectra import covariance_rank
from contramask.objectives.beit import BEiT
from contramask.objectives.cmae import CMAEContrast
from contramask.objectives.dino import DINO
from contramask.objectives.ibot import IBOT
from contramask.objectives.ijepa import IJEPA
from contramask.objectives.mae import MAE
from contramask.objectives.maskfeat import MaskFeat
from contramask.objectives.moco import MoCoV3
from contramask.objectives.objective import Objective
from contramask.objectives.simclr import SimCLR
from contramask.objectives.simmim import SimMIM
from contramask.training.pretraining import Pretraining
from contramask.types import Batch, Tokens

FEWEST = 16  # keys or images below which chance is too near to what is learned

READ_PATCHES = (MAE, SimMIM, MaskFeat, BEiT, IJEPA, CMAEContrast)  # and the class token by the way


def facts(module: Pretraining, batch: Batch, *, world: int, images: int) -> Facts:
    """What rules must know of a run.

    Args:
        module: whose objectives are known here; others are not judged.
        batch: a micro-batch of a rank.
        world: ranks.
        images: of a rank, at most, whose features are measured.
    """
    own = len(batch["label"])
    terms = module.terms
    pairs = {name: equal_scores(term, own * world) for name, term in terms.items()}
    return Facts(
        width=module.backbone.spec.dim,
        images=min(images, own),
        contrasts={k: v for k, v in pairs.items() if v and own * world >= FEWEST},
        words={k: math.log(t.head.out_features) for k, t in terms.items() if isinstance(t, BEiT)},
        codes=dict(_codes(module, 2 * own)),
        targets=tuple(k for k, t in terms.items() if isinstance(t, IJEPA) and t.normalise),
        masked=tuple(k for k, t in terms.items() if isinstance(t, MAE | SimMIM | MaskFeat)),
    )


def equal_scores(term: Objective, images: int) -> float:
    """The loss of a contrast of `images` whose similarities are all equal; 0: it is none."""
    if isinstance(term, MoCoV3):
        return 4 * term.temperature * math.log(images)
    if isinstance(term, CMAEContrast):
        return 2 * term.temperature * math.log(images)
    if isinstance(term, SimCLR):
        return 2 * term.scale * math.log(2 * images - 1)
    return 0.0


def _codes(module: Pretraining, images: int) -> Iterator[tuple[str, Codes]]:
    for name, term in module.terms.items():
        if isinstance(term, DINO | IBOT) and images >= FEWEST:
            key = f"train/loss/{name}" if isinstance(term, DINO) else f"train/{name}/cls"
            yield name, Codes(len(term.get_buffer("centre")), images, key)


def pooled(module: Pretraining, tokens: Tokens) -> Float[Tensor, "B D"]:
    """The feature that is trained: the class token, unless all objectives read patches.

    They may leave the class token as it is, the same for all images, without any harm.
    """
    patches = all(isinstance(term, READ_PATCHES) for term in module.terms.values())
    whole = tokens.patch.mean(1) if patches or tokens.prefix.shape[1] == 0 else tokens.cls
    return whole.float()


def largest_view(module: Pretraining, batch: Batch) -> Float[Tensor, "B 3 H W"]:
    """The first crop of the view with the most pixels that the student sees."""
    names = sorted({reads.view for reads in module.plan if reads.net == "student"})
    return max((batch["views"][name] for name in names), key=lambda view: view[0, 0].numel())[0]


@torch.no_grad()
def spread(features: Float[Tensor, "M D"]) -> dict[str, Float[Tensor, ""]]:
    """How wide unit features spread: both numbers are 0 for a point, but for rounding.

    `STD`: the mean deviation of a component, as a share of 1 / sqrt(D), which is that of the
    uniform sphere. `RANK`: the effective rank about their mean. Both are NaN where a feature is not
    finite, of which a decomposition would make an error.
    """
    finite = features.isfinite().all()
    unit = F.normalize(features.double().nan_to_num(), dim=1)
    deviation = unit.std(0).mean() * math.sqrt(unit.shape[1])
    rows = unit - unit.mean(0)
    # The smaller of the two matrices of products: 256 x 768 features take an eighth of the time
    # that their own decomposition does.
    products = rows @ rows.mT if len(rows) < rows.shape[1] else rows.mT @ rows
    found = {STD: deviation, RANK: covariance_rank(products)}
    return {key: value.where(finite, math.nan) for key, value in found.items()}


@torch.no_grad()
def constant_losses(module: Pretraining, batch: Batch, images: int) -> dict[str, Float[Tensor, ""]]:
    """What terms that reconstruct would lose with the best constant for all patches, by key.

    The mean for squared errors, the median for absolute ones, component by component.
    """
    found: dict[str, Tensor] = {}
    for name, term in module.terms.items():
        if not isinstance(term, MAE | SimMIM | MaskFeat):
            continue
        image = batch["views"][term.passes[0].view][0, :images]
        if isinstance(term, SimMIM):
            rows = patchify(image, term.spec.patch).flatten(0, 1).float()  # (M N, Z)
            loss = (rows - rows.median(0).values).abs().mean()
        else:
            loss = term.target(image).flatten(0, 1).float().var(0, correction=0).mean()
        found[f"{CHANCE}/{name}"] = loss
    return found
