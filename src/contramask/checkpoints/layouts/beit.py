"""SimMIM (arXiv:2111.09886) and BEiT (arXiv:2106.08254): relative positions, split biases."""

import torch

from contramask.checkpoints.layouts.layout import MARK, Layout, State

TABLE = "relative_position_bias_table"
INSIDE = (
    "mask_token",
    "lm_head.",
    "cls_pt_layers.",
    "head.",
    "rel_pos_bias.relative_position_index",
)


def _split(tensors: State, root: str) -> bool:
    return root + MARK in tensors and f"{root}blocks.0.attn.q_bias" in tensors


def rename(state: State) -> State:
    """q and v biases around a zero one of k, which softmax would not see; LayerScale; tables."""
    found: State = {}
    for key, value in state.items():
        *front, last = key.split(".")
        place = ".".join(front)
        match last:
            case "relative_position_index":
                continue
            case "q_bias":
                both = value, torch.zeros_like(value), state.get(f"{place}.v_bias", value[:0])
                found[f"{place}.qkv.bias"] = torch.cat(both)
            case "v_bias" | "k_bias":
                continue  # with q; k's is a buffer of zeros
            case "gamma_1" | "gamma_2":
                found[f"{place}.ls{last[-1]}.gamma"] = value
            case "relative_position_bias_table":
                block = f"{front[1]}." if front[0] == "blocks" else ""
                found[f"bias.{block}{TABLE}"] = value
            case _:
                found[key] = value
    return found


SIMMIM = Layout(
    name="simmim",
    holds=lambda tensors: _split(tensors, "encoder."),
    student=("encoder.",),
    inside=INSIDE,
    beside=("encoder.", "decoder."),
    rename=rename,
    interpolation="plain",
)
BEIT = Layout(
    name="beit",
    holds=lambda tensors: _split(tensors, ""),
    inside=INSIDE,
    rename=rename,
    interpolation="plain",
)
