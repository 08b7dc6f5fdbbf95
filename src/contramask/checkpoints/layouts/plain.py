"""A ViT by timm's names alone: timm's files, the "backbone only" files of many authors."""

from contramask.checkpoints.layouts.layout import MARK, Layout

PLAIN = Layout(
    name="timm",
    holds=lambda tensors: MARK in tensors,
    teacher=("state_dict_ema.", "model_ema."),
    inside=("head.", "head_dist.", "pre_logits.", "fc."),
    beside=("state_dict_ema.", "model_ema."),
)
