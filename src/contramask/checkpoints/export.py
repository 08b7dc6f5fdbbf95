"""The artefact of pretraining: `backbone.safetensors` and a `backbone.yaml` that says what it is.

Weights carry timm's names where timm knows the architecture, so `timm.create_model(name,
**arguments)` of the YAML loads them. What is handed on is a backbone, not a training checkpoint.
"""

import hashlib
import importlib
import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from contramask import __version__
from contramask.checkpoints.files import link_or_copy
from contramask.checkpoints.sidecar import beside, sync
from contramask.models.backbone import Backbone
from contramask.types import UserError

WEIGHTS, SHEET = "backbone.safetensors", "backbone.yaml"
# Two files cannot be renamed in one act. So the weights of the old sheet keep a second name until
# the new sheet is in place: whenever the process dies, the weights of the sheet are there.
BEFORE = f"{WEIGHTS}.before"


class ExportError(UserError):
    """A backbone that could not be written."""


def export_backbone(
    backbone: Backbone,
    folder: Path,
    *,
    net: Literal["student", "teacher"],
    step: int,
    data: dict[str, Any],
    origin: dict[str, Any] | None = None,
) -> Path:
    """Write both files; each appears under its name only when it is whole.

    Args:
        backbone: the eager module.
        folder: where the files go.
        net: which network this is.
        step: weight updates it has seen.
        data: what a user must feed it: `mean`, `std`, `size`.
        origin: where imported weights come from.

    Returns:
        The path of the weights.

    Raises:
        ExportError: the disk is full, or another error of the file system; an older backbone is
            as loadable as before, and nothing new is left behind.
    """
    state = {k.removeprefix("vit."): v.contiguous() for k, v in backbone.state_dict().items()}
    content = {
        "class_path": f"{type(backbone).__module__}.{type(backbone).__name__}",
        "init_args": backbone.config,
        "timm": backbone.timm_sheet(),
        "weights": {"file": WEIGHTS, "sha256": "", "net": net},
        "data": data,
        "step": step,
        **({"origin": origin} if origin else {}),
        "contramask": __version__,
        "commit": _commit(),
    }
    parts = [beside(folder / name) for name in (WEIGHTS, SHEET, BEFORE)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, parts[0])
        content["weights"]["sha256"] = _sha256(parts[0])
        parts[1].write_text(yaml.safe_dump(_plain(content), sort_keys=False), "utf-8")
        shutil.copymode(parts[1], parts[0])  # safetensors lets nobody else read its files
        _publish(folder)
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"{folder / WEIGHTS} could not be written: {error}; make room, or give a folder "
            "that can be written to (--out; of a run: --root)"
        ) from error
    finally:
        for part in parts:
            with suppress(OSError):
                part.unlink(missing_ok=True)
    return folder / WEIGHTS


def _publish(folder: Path) -> None:
    """Give both files their names, each once what it relies on is on the disk."""
    weights, sheet, before = (folder / name for name in (WEIGHTS, SHEET, BEFORE))
    for part in (beside(weights), beside(sheet)):
        sync(part)
    # An export that was killed may have left the only weights of the sheet under the second name.
    needed = before.is_file() and sheet.is_file() and _sha256(before) in sheet.read_text("utf-8")
    if weights.is_file() and not needed:
        link_or_copy(weights, beside(before))
        os.replace(beside(before), before)
        sync(folder)
    for file in (weights, sheet):
        os.replace(beside(file), file)
        sync(folder)
    before.unlink(missing_ok=True)


def load_backbone(path: Path) -> tuple[Backbone, dict[str, Any]]:
    """A backbone and its sheet from a run directory, or from either of the two files.

    Raises:
        UserError: nothing is there, the weights are not those of the sheet, or do not fit.
    """
    if not path.exists():
        raise UserError(
            f"there is no {path}: give a run directory, or a folder with {WEIGHTS} and {SHEET}"
        )
    folder = path if path.is_dir() else path.parent
    sheet = folder / SHEET
    for file in (sheet, folder / WEIGHTS):
        if not file.is_file():
            raise UserError(
                f"{folder} has no {file.name}: give a run directory whose training has exported a "
                "backbone (every export.every steps, and at its end), or wait for its first"
            )
    content = yaml.safe_load(sheet.read_text("utf-8"))
    weights = _weights(folder, content["weights"]["sha256"])
    backbone = build_backbone(content, sheet)
    try:
        state = load_file(weights)
    except SafetensorError as error:
        raise UserError(f"{weights} is no safetensors file: {error}; export it again") from error
    own = backbone.state_dict()
    named = {k if k in own else f"vit.{k}": v for k, v in state.items()}
    wrong = sorted(own.keys() ^ named.keys())
    wrong += [k for k in own.keys() & named.keys() if own[k].shape != named[k].shape]
    if wrong:
        raise UserError(f"{weights} does not fit {sheet.name}: {', '.join(wrong[:5])}")
    backbone.load_state_dict(named)
    return backbone, content


def _weights(folder: Path, digest: str) -> Path:
    """The file with this checksum: of an export that was killed half-way, the one before."""
    for file in (folder / WEIGHTS, folder / BEFORE):
        if file.is_file() and _sha256(file) == digest:
            return file
    raise UserError(
        f"{folder / WEIGHTS} has another checksum than {SHEET} says: one of them was changed or "
        "damaged; export the run again"
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build_backbone(content: dict[str, Any], sheet: Path) -> Backbone:
    """The module that `class_path` and `init_args` of a file describe, with fresh weights.

    Raises:
        UserError: a class that contramask does not ship, or arguments it does not take.
    """
    # The class is named in a file: only what contramask ships is built from it.
    module, _, name = str(content["class_path"]).rpartition(".")
    if not module.startswith("contramask.models."):
        raise UserError(
            f"{sheet}: class_path is {content['class_path']}; backbones of contramask.models are "
            "built from a file, others in Python"
        )
    cls = getattr(importlib.import_module(module), name)
    arguments = dict(content["init_args"])
    size = arguments.get("img_size")
    if isinstance(size, list):
        arguments["img_size"] = tuple(size)
    return cls(**arguments)


def _plain(value: Any) -> Any:
    """Tuples as lists, for YAML."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _commit() -> str | None:
    """The commit of the source tree, where there is one."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
