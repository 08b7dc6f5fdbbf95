"""Backbones for others: our artefact again, a file for timm, an ONNX graph."""

import importlib.util
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from contramask.checkpoints.export import SHEET, WEIGHTS, export_backbone, load_backbone
from contramask.checkpoints.files import newest
from contramask.checkpoints.importing import Imported, import_backbone
from contramask.checkpoints.layouts.layout import IMAGENET, Net
from contramask.models.backbone import Backbone
from contramask.models.positions import RelativeBias
from contramask.models.vit import VisionTransformer
from contramask.types import UserError

Form = Literal["safetensors", "timm", "onnx"]
TIMM, GRAPH = "timm.safetensors", "backbone.onnx"
NEEDED = ("onnx", "onnxscript")
# Arguments that timm's Beit shares with its VisionTransformer.
SHARED = ("embed_dim", "depth", "num_heads", "mlp_ratio", "init_values", "qkv_bias",
          "drop_path_rate")  # fmt: skip


def export(
    source: Path, *, net: Net | None = None, form: Form = "safetensors", out: Path | None = None
) -> list[str]:
    """Write a backbone; returns lines that say what was written and how to read it.

    Args:
        source: a run directory, a training checkpoint, or a folder with an exported backbone.
        net: which network; None: the teacher where there is one.
        form: `safetensors`, `timm` or `onnx`.
        out: the folder; None: `export` inside or beside the source.

    Raises:
        UserError: no such network there, or a format that cannot hold it.
    """
    backbone, found, step, data = _backbone(source, net)
    backbone.eval()
    out = out or (source if source.is_dir() else source.parent) / "export"
    out.mkdir(parents=True, exist_ok=True)
    lines = [f"{found} of {source}, after {step} steps"]
    if form == "safetensors":
        export_backbone(backbone, out, net=found, step=step, data=data)
        return [*lines, f"written to {out / WEIGHTS} and {out / SHEET}"]
    if not isinstance(backbone, VisionTransformer):
        raise UserError(f"{type(backbone).__name__} has no {form} form; use --format safetensors")
    if form == "timm":
        return lines + to_timm(backbone, out / TIMM)
    return lines + to_onnx(backbone, out / GRAPH)


def _backbone(source: Path, net: Net | None) -> tuple[Backbone, Net, int, dict[str, Any]]:
    """The network, which one it is, its step, and what it is fed."""
    if not source.exists():
        raise UserError(f"no {source}; give a run directory or a folder with backbone.safetensors")
    folder = source if source.is_dir() else source.parent
    checkpoint = newest(source / "checkpoints") if source.is_dir() else None
    if source.suffix == ".ckpt":
        checkpoint = source
    if checkpoint is None:
        backbone, sheet = load_backbone(source)
        found: Net = sheet["weights"]["net"]
        if net not in (None, found):
            raise UserError(
                f"{folder} holds the {found} alone and no checkpoint with the {net}; leave --net "
                "out, or give the run"
            )
        return backbone, found, sheet["step"], sheet["data"]
    imported = import_backbone(checkpoint, net=net)
    data = load_backbone(folder)[1]["data"] if (folder / SHEET).is_file() else _plain_data(imported)
    return imported.backbone, imported.net, imported.step, data


def _plain_data(imported: Imported) -> dict[str, Any]:
    spec = imported.backbone.spec
    return {**IMAGENET, "size": min(spec.grid) * spec.patch}


def to_timm(backbone: VisionTransformer, path: Path) -> list[str]:
    """A checkpoint for `timm.create_model(..., checkpoint_path=...)`.

    Relative positions become timm's `Beit`. It has no bias of the keys, which adds the same to all
    of a query's scores, so that softmax does not see it.
    """
    state = {k.removeprefix("vit."): v for k, v in backbone.state_dict().items()}
    notes: list[str] = []
    if backbone.bias is None:
        name, arguments = backbone.config["name"], backbone.timm_arguments()
    else:
        name, arguments = "beit_base_patch16_224", _beit_arguments(backbone)
        state = _beit_state(state)
        if not arguments.get("init_values"):  # the name brings LayerScale: by one, it does nothing
            one = torch.ones(backbone.spec.dim)
            gammas = (f"blocks.{i}.gamma_{j}" for i in range(backbone.spec.depth) for j in (1, 2))
            state |= {name: one.clone() for name in gammas}
        notes.append("the bias of the keys is left out: softmax does not see it")
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    given = "".join(f", {k}={v!r}" for k, v in arguments.items())
    call = f"timm.create_model({name!r}, checkpoint_path={str(path)!r}{given})"
    return [f"written to {path}", *notes, call]


def _beit_arguments(backbone: VisionTransformer) -> dict[str, Any]:
    given = backbone.config["timm"]
    plain = {k: v for k, v in given.items() if v is not None}
    foreign = sorted(plain.keys() - {*SHARED, "global_pool"})
    if foreign:
        raise UserError(
            f"timm's Beit, which has relative positions, knows no {', '.join(foreign)}; use "
            "--format safetensors or onnx"
        )
    blocks = list(backbone.vit.blocks)
    heads: int = blocks[0].attn.num_heads  # pyright: ignore
    sizes = {"embed_dim": backbone.spec.dim, "depth": len(blocks), "num_heads": heads}
    shared = isinstance(backbone.bias, RelativeBias)
    return {
        "img_size": backbone.config["img_size"],
        "patch_size": backbone.spec.patch,
        **sizes,
        **{k: v for k, v in plain.items() if k in SHARED and k not in sizes},
        "use_abs_pos_emb": False,
        "use_rel_pos_bias": not shared,
        "use_shared_rel_pos_bias": shared,
        "global_pool": "token",
        "num_classes": 0,
    }


def _beit_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith("attn.qkv.bias"):
            place = key.removesuffix("qkv.bias")
            found[f"{place}q_bias"], _, found[f"{place}v_bias"] = value.chunk(3)
        elif key.startswith("bias."):
            *block, table = key.split(".")[1:]
            place = f"blocks.{block[0]}.attn" if block else "rel_pos_bias"
            found[f"{place}.{table}"] = value
        else:
            found[key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")] = value
    return found


class Graph(nn.Module):
    """Images to class token with registers, and patches: what ONNX is given."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.backbone(image)
        return tokens.prefix, tokens.patch


def to_onnx(backbone: Backbone, path: Path) -> list[str]:
    """A graph from `image` (B, 3, H, W), of any B, to `prefix` (B, R, D) and `patch` (B, N, D).

    Raises:
        UserError: what `torch.onnx` needs is not installed.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format onnx needs {' and '.join(missing)}: uv sync --extra onnx, or pip install "
            "'contramask[onnx]'"
        )
    spec = backbone.spec
    size = (spec.grid[0] * spec.patch, spec.grid[1] * spec.patch)
    # Attention is spelled out: the fused kernel's strides are not those ONNX is told of.
    with sdpa_kernel(SDPBackend.MATH):
        torch.onnx.export(
            Graph(backbone).eval(),
            (torch.zeros(2, 3, *size),),
            path,
            dynamo=True,
            external_data=False,
            input_names=["image"],
            output_names=["prefix", "patch"],
            dynamic_shapes=({0: "batch"},),
            verbose=False,
        )
    return [
        f"written to {path}",
        f"input image (B, 3, {size[0]}, {size[1]}), normalised; outputs prefix (B, R, {spec.dim}) "
        f"and patch (B, {spec.patches}, {spec.dim}), after the final norm",
    ]
