"""MAE (arXiv:2111.06377): pretraining, the released encoder, fine-tuned with `fc_norm`."""

import torch

from contramask.checkpoints.layouts.layout import MARK, Layout, State
from contramask.functional.patches import sincos


def holds(tensors: State) -> bool:
    """A decoder, or the fixed positions of the released encoders (column first)."""
    return MARK in tensors and (
        "decoder_pred.weight" in tensors or fixed(tensors, rows_first=False)
    )


def fixed(tensors: State, *, rows_first: bool) -> bool:
    """Whether positions are the sine-cosine table of a square grid, after a zero class token."""
    table = tensors.get("pos_embed")
    if table is None or "cls_token" not in tensors or table.shape[-1] % 4:
        return False
    side = round((table.shape[1] - 1) ** 0.5)
    if side * side != table.shape[1] - 1:
        return False
    expected = sincos(table.shape[-1], (side, side), rows_first=rows_first)
    near = torch.allclose(table[0, 1:].float(), expected, rtol=0, atol=1e-3)
    return near and not table[0, 0].any()


MAE = Layout(
    name="mae",
    holds=holds,
    inside=(
        "head.",
        "mask_token",
        "decoder_embed.",
        "decoder_pos_embed",
        "decoder_blocks.",
        "decoder_norm.",
        "decoder_pred.",
    ),
    interpolation="plain",
)
