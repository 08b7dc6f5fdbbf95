"""MoCo v3 (arXiv:2104.02057): a base and a momentum encoder, each with its projector as head."""

from contramask.checkpoints.layouts.layout import HEADS, MARK, Layout

MOCO_V3 = Layout(
    name="mocov3",
    holds=lambda tensors: (
        f"base_encoder.{MARK}" in tensors or f"momentum_encoder.{MARK}" in tensors
    ),
    student=("base_encoder.",),
    teacher=("momentum_encoder.",),
    inside=("head.",),
    beside=("base_encoder.", "momentum_encoder.", "predictor."),
    heads=HEADS | {384: 12},  # its ViT-S; timm's has 6
)
