"""A fine-tuned classifier as files: the exported backbone, and its head beside it.

`head.safetensors` holds `weight` (classes, D) and `bias`; `head.yaml` says how tokens are pooled
and which backbone it was trained with. The folder is an exported backbone like any other as well.
"""

from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from contramask.checkpoints.export import SHEET, ExportError, export_backbone, load_backbone
from contramask.models.classifier import Classifier
from contramask.types import UserError

HEAD, HEAD_SHEET = "head.safetensors", "head.yaml"


def save_classifier(
    classifier: Classifier,
    folder: Path,
    *,
    step: int,
    data: dict[str, Any],
    classes: list[str] | None = None,
    origin: dict[str, Any] | None = None,
) -> Path:
    """Write backbone and head.

    Args:
        classifier: the eager module.
        folder: where the files go.
        step: weight updates it has seen in fine-tuning.
        data: what a user must feed it: `mean`, `std`, `size`, `resize`.
        classes: their names in the order of the labels, if known.
        origin: what was fine-tuned.

    Returns:
        The path of the head's weights.

    Raises:
        ExportError: the disk is full, or another error of the file system.
    """
    export_backbone(classifier.backbone, folder, net="student", step=step, data=data, origin=origin)
    sheet = yaml.safe_load((folder / SHEET).read_text("utf-8"))
    content = {
        "pool": classifier.pool,
        "classes": classifier.classes,
        "names": classes,
        "backbone": sheet["weights"]["sha256"],
    }
    state = {k: v.detach().cpu().contiguous() for k, v in classifier.head.state_dict().items()}
    parts = [folder / f".{name}.part" for name in (HEAD, HEAD_SHEET)]
    try:
        save_file(state, parts[0])
        parts[1].write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
        for part, name in zip(parts, (HEAD, HEAD_SHEET), strict=True):
            part.replace(folder / name)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{folder / HEAD} could not be written: {error}; make room") from error
    return folder / HEAD


def load_classifier(path: Path) -> tuple[Classifier, dict[str, Any]]:
    """A classifier, and the sheets of its backbone with `head` in it.

    Args:
        path: the folder of a fine-tuning, or one of its files.

    Raises:
        UserError: nothing is there, or backbone and head do not belong together.
    """
    backbone, sheet = load_backbone(path)
    folder = path if path.is_dir() else path.parent
    try:
        head = yaml.safe_load((folder / HEAD_SHEET).read_text("utf-8"))
        state = load_file(folder / HEAD)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} has no {Path(error.filename or HEAD).name}: a classifier is what "
            "`contramask finetune` leaves, at its end"
        ) from error
    except SafetensorError as error:
        raise UserError(f"{folder / HEAD} is no safetensors file: {error}") from error
    if head["backbone"] != sheet["weights"]["sha256"]:
        raise UserError(
            f"{folder / HEAD} was trained with another backbone than the one beside it; take both "
            "from one fine-tuning"
        )
    classifier = Classifier(backbone, head["classes"], pool=head["pool"])
    classifier.head.load_state_dict(state)
    return classifier, {**sheet, "head": head}
