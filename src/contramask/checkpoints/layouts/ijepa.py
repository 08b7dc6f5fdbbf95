"""I-JEPA (arXiv:2301.08243): a context encoder and its average, both without class token."""

from contramask.checkpoints.layouts.layout import MARK, Layout, State


def holds(tensors: State) -> bool:
    """Encoders without class token."""
    return any(
        f"{net}.{MARK}" in tensors and f"{net}.cls_token" not in tensors
        for net in ("encoder", "target_encoder")
    )


IJEPA = Layout(
    name="ijepa",
    holds=holds,
    student=("encoder.",),
    teacher=("target_encoder.",),
    prefer="teacher",
    inside=(),
    beside=("encoder.", "target_encoder.", "predictor."),
    interpolation="plain",
)
