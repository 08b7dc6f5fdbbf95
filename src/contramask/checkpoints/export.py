"""The artefact of pretraining: `backbone.safetensors` and a `backbone.yaml` that says what it is.

Weights carry timm's names where timm knows the architecture, so `timm.create_model(name,
**arguments)` of the YAML loads them. What is handed on is a backbone, not a training checkpoint.
"""

import hashlib
import importlib
import os
import subprocess
from pathlib import Path
from typing import Any, Literal

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from contramask import __version__
from contramask.models.backbone import Backbone
from contramask.types import UserError

WEIGHTS, SHEET = "backbone.safetensors", "backbone.yaml"


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
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {k.removeprefix("vit."): v.contiguous() for k, v in backbone.state_dict().items()}
    part = folder / f"{WEIGHTS}.tmp.{os.getpid()}"
    save_file(state, part)
    digest = hashlib.sha256(part.read_bytes()).hexdigest()
    content = {
        "class_path": f"{type(backbone).__module__}.{type(backbone).__name__}",
        "init_args": backbone.config,
        "timm": backbone.timm_sheet(),
        "weights": {"file": WEIGHTS, "sha256": digest, "net": net},
        "data": data,
        "step": step,
        **({"origin": origin} if origin else {}),
        "contramask": __version__,
        "commit": _commit(),
    }
    beside = folder / f"{SHEET}.tmp.{os.getpid()}"
    beside.write_text(yaml.safe_dump(_plain(content), sort_keys=False), "utf-8")
    os.replace(part, folder / WEIGHTS)
    os.replace(beside, folder / SHEET)
    return folder / WEIGHTS


def load_backbone(path: Path) -> tuple[Backbone, dict[str, Any]]:
    """A backbone and its sheet from a run directory, or from either of the two files.

    Raises:
        UserError: nothing is there, the weights are not those of the sheet, or do not fit.
    """
    folder = path if path.is_dir() else path.parent
    sheet, weights = folder / SHEET, folder / WEIGHTS
    for file in (sheet, weights):
        if not file.is_file():
            raise UserError(
                f"{folder} has no {file.name}: give a run directory whose training has exported "
                "a backbone (at its end and at every checkpoint), or wait for its first"
            )
    content = yaml.safe_load(sheet.read_text("utf-8"))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    if digest != content["weights"]["sha256"]:
        raise UserError(
            f"{weights} has another checksum than {sheet.name} says: one of them was changed or "
            "damaged; export the run again"
        )
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
