"""DINO (arXiv:2104.14294), iBOT (arXiv:2111.07832), DINOv2 (arXiv:2304.07193)."""

import re

from contramask.checkpoints.layouts.layout import MARK, Layout, State

HEAD = ("head.", "mask_token", "masked_embed")
PLACES = {
    "student": ("student.backbone.", "student.", ""),
    "teacher": ("teacher.backbone.", "teacher."),
}
BESIDE = ("student.", "teacher.", "head.", "dino_head.", "ibot_head.", "dino_loss.", "ibot_loss.")


def holds_dino(tensors: State) -> bool:
    """A student and a teacher in the authors' wrapper, or one of them."""
    return any(f"{net}.backbone.{MARK}" in tensors for net in ("student", "teacher"))


def holds_ibot(tensors: State) -> bool:
    """As DINO, with a token for hidden patches or a head for patches."""
    ibot = any(k.endswith(("masked_embed", "head.last_layer2.weight_v")) for k in tensors)
    return ibot and (holds_dino(tensors) or MARK in tensors)


def holds_dinov2(tensors: State) -> bool:
    """A mask token (1, D), and LayerScale."""
    return any(
        k.endswith("mask_token") and v.ndim == 2 and _scaled(tensors, k.removesuffix("mask_token"))
        for k, v in tensors.items()
    )


def _scaled(tensors: State, root: str) -> bool:
    return any(k.startswith(f"{root}blocks.") and k.endswith("ls1.gamma") for k in tensors)


def rename_dinov2(state: State) -> State:
    """Registers, SwiGLU and chunks of blocks by timm's names.

    timm adds no position to the class token of a model with registers, so it goes into the token.
    """
    found: State = {}
    for key, value in state.items():
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key)
        name = name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        found["reg_token" if name == "register_tokens" else name] = value
    if "reg_token" in found:
        positions = found["pos_embed"]
        found["cls_token"] = found["cls_token"] + positions[:, :1]
        found["pos_embed"] = positions[:, 1:]
    return found


DINO = Layout(
    name="dino",
    holds=holds_dino,
    student=PLACES["student"],
    teacher=PLACES["teacher"],
    prefer="teacher",
    inside=HEAD,
    beside=BESIDE,
    interpolation="dino",
)
IBOT = Layout(
    name="ibot",
    holds=holds_ibot,
    student=PLACES["student"],
    teacher=PLACES["teacher"],
    prefer="teacher",
    inside=HEAD,
    beside=BESIDE,
    interpolation="dino",
)
DINO_V2 = Layout(
    name="dinov2",
    holds=holds_dinov2,
    student=PLACES["student"],
    teacher=PLACES["teacher"],
    prefer="teacher",
    inside=HEAD,
    beside=BESIDE,
    rename=rename_dinov2,
    interpolation="dino",
)
