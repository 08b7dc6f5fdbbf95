"""Weights of others as a backbone of ours: strictly, every tensor used or dropped by its name."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from contramask.checkpoints.architecture import Wishes, infer
from contramask.checkpoints.export import build_backbone, export_backbone
from contramask.checkpoints.foreign import Foreign, read
from contramask.checkpoints.layouts import LAYOUTS
from contramask.checkpoints.layouts.layout import IMAGENET, NETS, Layout, Net, State, under
from contramask.models.backbone import Backbone
from contramask.types import UserError

VIT = "contramask.models.vit.VisionTransformer"


@dataclass(frozen=True)
class Imported:
    """A backbone from a file of others, and how it came out of it."""

    backbone: Backbone
    layout: str
    net: Net
    step: int
    dropped: dict[str, int]  # tensors by the part they belong to
    notes: tuple[str, ...]


def import_backbone(
    path: Path,
    *,
    net: Net | None = None,
    layout: str | None = None,
    wishes: Wishes | None = None,
    allow: Sequence[str] = (),
    drop: Sequence[str] = (),
) -> Imported:
    """Read a checkpoint of a known layout into a `VisionTransformer`.

    Args:
        path: the file.
        net: which network; None: the one its authors publish, or the one that is there.
        layout: its name in `LAYOUTS`; None: recognised.
        wishes: what shapes do not tell.
        allow: objects in the file to pass over, see `foreign.read`.
        drop: names, or parts that end with a dot, to leave out beside those that are known.

    Raises:
        UserError: nothing that is known, tensors that are not, or tensors that are missing.
    """
    file = read(path, allow)
    known = _layout(file, layout)
    root, found = _network(file, known, net)
    state, dropped = _select(file, known, root, drop)
    state, notes = _renamed(known, state)
    source = f"{path} ({known.name} layout)"
    described = _described(path) if known.name == "contramask" else None
    if described is None:
        registers = "reg_token" in state  # they came with antialiasing: DINOv2, timm
        arguments, state = infer(
            state,
            source=source,
            heads=known.heads,
            interpolation="antialias" if registers else known.interpolation,
            wishes=wishes or Wishes(),
        )
        described = {"class_path": VIT, "init_args": arguments}
    elif wishes not in (None, Wishes()):
        raise UserError(
            f"{source}: its configuration says what it is; leave out what describes or resizes it "
            "(--heads, --grid, --img_size, --name, --interpolation)"
        )
    backbone = build_backbone(described, path)
    _load(backbone, state, source)
    return Imported(backbone, known.name, found, file.step, dropped, notes)


def write_imported(
    imported: Imported, source: Path, out: Path, data: dict[str, Any] | None = None
) -> Path:
    """Write `backbone.safetensors` and `backbone.yaml`, which say where they come from.

    Args:
        imported: what to write.
        source: the file it was read from.
        out: the folder.
        data: `mean` and `std` the network was fed with; those of ImageNet where not given.
    """
    spec = imported.backbone.spec
    size = min(spec.grid) * spec.patch
    with open(source, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return export_backbone(
        imported.backbone,
        out,
        net=imported.net,
        step=imported.step,
        data={**IMAGENET, **(data or {}), "size": size},
        origin={"file": source.name, "sha256": digest, "layout": imported.layout},
    )


def _layout(file: Foreign, name: str | None) -> Layout:
    if name is not None:
        if name not in LAYOUTS:
            raise UserError(f"no layout {name!r}; --layout may be {', '.join(LAYOUTS)}")
        return LAYOUTS[name]
    found = next((known for known in LAYOUTS.values() if known.holds(file.tensors)), None)
    if found is None:
        names = sorted(file.tensors)
        held = f"tensors {', '.join(names[:3])} ..." if names else "no tensors"
        raise UserError(
            f"{file.path}: no ViT of a known layout in it, but {held}; known are "
            f"{', '.join(LAYOUTS)}, of which each has a patch_embed.proj.weight"
        )
    return found


def _network(file: Foreign, layout: Layout, net: Net | None) -> tuple[str, Net]:
    """The prefix of the network that was asked for, else of the one that is preferred."""
    there: dict[Net, str | None] = {
        "student": layout.root(file.tensors, "student"),
        "teacher": layout.root(file.tensors, "teacher"),
    }
    held: list[Net] = [name for name, root in there.items() if root is not None]
    if net is None and held:
        net = layout.prefer if layout.prefer in held else held[0]
    root = None if net is None else there[net]
    if net is None or root is None:
        raise UserError(
            f"{file.path}, read as {layout.name}, holds {' and '.join(held) or 'no network'}"
            f"{f', no {net}' if net else ''}; choose --net, or another --layout"
        )
    # A file of one bare network is the one the authors publish.
    return root, layout.prefer if root == "" and layout.teacher else net


def _select(
    file: Foreign, layout: Layout, root: str, drop: Sequence[str]
) -> tuple[State, dict[str, int]]:
    """The network's tensors, and how many of what else there are, all by known names."""
    inside: State = {}
    dropped: Counter[str] = Counter(dict.fromkeys(file.aside, 0))
    unknown = []
    # A bare network beside the chosen one is left out whole, as others are by their prefix.
    bare = root != "" and "" in (layout.root(file.tensors, n) for n in NETS)
    for key in file.tensors:
        short = key.removeprefix(root)
        own = key.startswith(root) and (root != "" or not under(key, layout.beside))
        if under(key, drop) or (own and under(short, layout.inside)):
            dropped[_part(key)] += 1
        elif own:
            inside[short] = file.tensors[key]
        elif bare or under(key, layout.beside):
            dropped[_part(key)] += 1
        else:
            unknown.append(key)
    if unknown:
        raise _unknown(file.path, layout.name, unknown)
    return inside, dict(dropped)


def _unknown(path: Path, layout: str, names: Sequence[str]) -> UserError:
    parts = " ".join(dict.fromkeys(f"--drop {_part(name)}." for name in names))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return UserError(
        f"{path} ({layout} layout) holds tensors that are not known: {', '.join(names[:5])}{more}; "
        f"if they are no part of the backbone, leave them out by {parts[:200]}, or set --layout"
    )


def _part(name: str) -> str:
    """What a tensor belongs to, in a summary: its name without the last word, at most two words."""
    words = name.split(".")
    return ".".join(words[:-1][:2]) or words[0]


def _renamed(layout: Layout, state: State) -> tuple[State, tuple[str, ...]]:
    state = layout.rename(state)
    if "norm.weight" in state or "fc_norm.weight" not in state:
        return state, ()
    moved = {re.sub("^fc_norm", "norm", k): v for k, v in state.items()}
    note = (
        "fine-tuned with fc_norm: it normed the mean of the patches, here it norms every token; "
        "norm(mean of the last block's patches) is what its classifier read"
    )
    return moved, (note,)


def _described(path: Path) -> dict[str, Any] | None:
    """The backbone in the configuration of the run that a training checkpoint belongs to."""
    for folder in path.resolve().parents[:2]:
        config = folder / "config.yaml"
        if config.is_file():
            content = yaml.safe_load(config.read_text("utf-8"))
            backbone = content.get("model", {}).get("backbone") if content else None
            if isinstance(backbone, dict) and "class_path" in backbone:
                return {"init_args": {}, **backbone}
    return None


def _load(backbone: Backbone, state: dict[str, Tensor], source: str) -> None:
    """Every tensor in its place, and every place filled."""
    own = backbone.state_dict()
    named = {k if k.startswith("bias.") else f"vit.{k}": v for k, v in state.items()}
    told = []
    if extra := sorted(named.keys() - own.keys()):
        told.append(f"unknown {_listed(extra)}")
    if missing := sorted(own.keys() - named.keys()):
        told.append(f"missing {_listed(missing)}")
    both = sorted(own.keys() & named.keys())
    if wrong := [k for k in both if own[k].shape != named[k].shape]:
        sizes = f"{tuple(named[wrong[0]].shape)} for {tuple(own[wrong[0]].shape)}"
        told.append(f"of another shape {_listed(wrong)} ({sizes})")
    if told:
        raise UserError(
            f"{source} is not the plain ViT that its shapes promise: {'; '.join(told)}; set "
            "--layout, --name, --grid or --drop, if one of them tells what it is"
        )
    backbone.load_state_dict(named)


def _listed(names: Sequence[str]) -> str:
    short = [name.removeprefix("vit.") for name in names[:4]]
    return ", ".join(short) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def dropped_parts(dropped: dict[str, int]) -> dict[str, int]:
    """With what stands at the top alone: `teacher.blocks` and `teacher.norm` are `teacher`."""
    parts: Counter[str] = Counter()
    for name, count in dropped.items():
        parts[name.split(".")[0]] += count
    return dict(parts)
