"""contramask's own: a training checkpoint, or an exported backbone."""

from contramask.checkpoints.layouts.layout import MARK, Layout, State

OBJECTIVES = ("objectives.", "masks.")


def rename(state: State) -> State:
    """timm's module is the attribute `vit`; `bias` stands beside it."""
    return {name.removeprefix("vit."): value for name, value in state.items()}


CONTRAMASK = Layout(
    name="contramask",
    holds=lambda tensors: (
        f"backbone.vit.{MARK}" in tensors and any(k.startswith(OBJECTIVES) for k in tensors)
    ),
    student=("backbone.",),
    teacher=("teacher.",),
    prefer="teacher",
    inside=(),
    beside=("backbone.", "teacher.", *OBJECTIVES),
    rename=rename,
    mark=f"vit.{MARK}",
)
