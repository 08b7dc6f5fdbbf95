"""Nothing in a file is run; what is not understood is told in a line."""

import argparse
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from contramask.checkpoints.foreign import ALLOWED, read
from contramask.checkpoints.importing import import_backbone
from contramask.types import UserError
from tests.builders import randn
from tests.checkpoints.convert_files import HEADS, IMAGE, assert_same, imported, vit


class Harm:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def leave(path: str) -> None:
    Path(path).write_text("run")


def harms(path: Path) -> dict[str, Harm]:
    import os

    target = str(path / "run")
    return {
        "system": Harm(os.system, f"touch {target}"),
        "eval": Harm(eval, f"open({target!r}, 'w')"),
        "open": Harm(open, target, "w"),
        "function": Harm(leave, target),
        "getattr": Harm(getattr, Path(target), "touch"),
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ["system", "eval", "open", "function", "getattr"])
def test_a_malicious_file_runs_nothing(tmp_path, kind, zipped):
    content = {"model": vit().state_dict(), "args": harms(tmp_path)[kind]}
    path = tmp_path / "bad.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"nothing was run.*cannot be allowed") as caught:
        import_backbone(path, allow=["argparse.Namespace", "numpy.dtype"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    # The file is what it claims to be: whoever unpickles it runs it.
    if kind == "system" and not zipped:
        pickle.loads(pickle.dumps(content["args"]))
        assert (tmp_path / "run").exists()


def test_a_plain_pickle_runs_nothing(tmp_path):
    path = tmp_path / "bad.pkl"
    path.write_bytes(pickle.dumps({"model": harms(tmp_path)["system"]}))
    with pytest.raises(UserError, match=r"bad\.pkl"):
        read(path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["os.system", "posix.system", "builtins.eval", "eval", "x.Y"])
def test_harm_cannot_be_allowed(tmp_path, name):
    torch.save({"model": vit().state_dict(), "args": harms(tmp_path)["system"]}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=rf"--allow {name}: only what is known to be harmless"):
        import_backbone(tmp_path / "a.pth", allow=[name])
    assert not (tmp_path / "run").exists()


def test_no_allowed_name_is_the_thing_itself():
    """Stand-ins keep nothing and call nothing, whatever a file does with them."""
    stand_ins = {kind.__qualname__ for kind in ALLOWED.values()}
    assert stand_ins == {"Inert", "OrderedDict"}
    inert = ALLOWED["argparse.Namespace"]
    made = inert("touch", key=print)
    made.__setstate__({"a": 1})
    assert not vars(made)


@pytest.fixture
def yacs(monkeypatch):
    """Enough of yacs to write a file as SimMIM does; gone before it is read."""
    module = types.ModuleType("yacs.config")

    class CfgNode(dict):
        pass

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module.CfgNode = CfgNode
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        node = CfgNode(MODEL=CfgNode(TYPE="vit"))
        node.__dict__.update({"__immutable__": True, "__deprecated_keys__": {"OLD"}})

        def save(content, path):
            torch.save({**content, "config": node}, path)

        yield save


def test_yacs_of_simmim(tmp_path, yacs, monkeypatch):
    model, path = vit(), tmp_path / "simmim.pth"
    yacs({"model": model.state_dict()}, path)
    monkeypatch.delitem(sys.modules, "yacs.config")
    with pytest.raises(UserError, match=r"pass over them by --allow yacs\.config\.CfgNode$"):
        import_backbone(path, wishes=HEADS)
    found = import_backbone(path, wishes=HEADS, allow=["yacs.config.CfgNode"])
    assert_same(found.backbone, model.forward_features(IMAGE))
    assert found.dropped["config"] == 0


def test_arguments_and_numbers_of_numpy(tmp_path):
    """As MAE's training checkpoints and timm's have them; every class has to be named."""
    model, path = vit(), tmp_path / "file.pth"
    args = argparse.Namespace(lr=1e-3, out=Path("runs"))
    torch.save({"model": model.state_dict(), "args": args, "best": np.float64(0.5)}, path)
    with pytest.raises(UserError, match=r"--allow argparse\.Namespace") as caught:
        import_backbone(path, wishes=HEADS)
    words = str(caught.value).split()
    wanted = [words[i + 1] for i, word in enumerate(words) if word == "--allow"]
    assert len(wanted) >= 4
    found = import_backbone(path, wishes=HEADS, allow=wanted)
    assert_same(found.backbone, model.forward_features(IMAGE))
    assert {"args", "best"} <= found.dropped.keys()
    with pytest.raises(UserError, match="--allow"):
        import_backbone(path, wishes=HEADS, allow=wanted[1:])


def test_what_was_allowed_once_is_not_allowed_for_ever(tmp_path):
    content = {"model": vit().state_dict(), "args": argparse.Namespace()}
    imported(tmp_path, content, allow=["argparse.Namespace"])
    with pytest.raises(UserError, match="argparse"):
        imported(tmp_path, content)


# ---- what is no ViT, or not a whole one ----------------------------------------------------------


def without(*parts: str):
    return {k: v for k, v in vit().state_dict().items() if not any(p in k for p in parts)}


def swin():
    names = ["patch_embed.proj.weight", "layers.0.blocks.0.norm1.weight"]
    return {n: randn(24, 3, 8, 8) for n in names}


CASES = {
    "resnet": ({"conv1.weight": randn(4, 3, 7, 7)}, "no ViT of a known layout.*conv1.weight"),
    "swin": (swin(), "another architecture than a plain ViT"),
    "nothing": ({"epoch": 3}, "no ViT of a known layout in it, but no tensors"),
    "a list": ([randn(2)], "holds a list, no tensors by name"),
    "a block missing": (without("blocks.1."), "another architecture"),
    "a tensor missing": (without("blocks.1.attn.proj.bias"), "missing blocks.1.attn.proj.bias"),
    "no norm": (without("norm.weight", "norm.bias"), "missing.*norm.weight"),
    "no positions": (without("pos_embed"), "no pos_embed and no relative positions"),
    "more": (vit().state_dict() | {"neck.weight": randn(3)}, "unknown neck.weight"),
    "more blocks": (
        vit().state_dict() | {"blocks.2.adapter.weight": randn(3)},
        r"unknown blocks\.2\.adapter\.weight",
    ),
    "another shape": (
        vit().state_dict() | {"blocks.2.mlp.fc1.bias": randn(7)},
        r"another shape blocks\.2\.mlp\.fc1\.bias \(\(7,\) for \(96,\)\)",
    ),
    "four colours": (
        vit().state_dict() | {"patch_embed.proj.weight": randn(24, 4, 8, 8)},
        r"three colours",
    ),
    "twice": (
        vit().state_dict() | {"module.norm.bias": randn(24)},
        r"holds norm\.bias twice",
    ),
    "beside a backbone": (
        {f"backbone.{k}": v for k, v in vit().state_dict().items()} | {"neck.0.weight": randn(3)},
        r"not known: neck\.0\.weight; .*--drop neck\.0\.",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_fails_with_a_reason(tmp_path, name):
    content, message = CASES[name]
    with pytest.raises(UserError, match=message) as caught:
        imported(tmp_path, content)
    assert "\n" not in str(caught.value)
    assert "file.pth" in str(caught.value)


def test_unknown_parts_can_be_dropped_by_name(tmp_path):
    content, _ = CASES["beside a backbone"]
    assert imported(tmp_path, content, drop=["neck."]).dropped == {"neck.0": 1}


def test_heads_that_nothing_tells(tmp_path):
    torch.save(vit().state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a width of 24 does not tell.*--heads.*384: 6"):
        import_backbone(tmp_path / "a.pth")


@pytest.mark.parametrize("how", ["cut", "text", "empty", "safetensors"])
def test_damaged_files(tmp_path, how):
    path = tmp_path / ("a.safetensors" if how == "safetensors" else "a.pth")
    torch.save(vit().state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes({"text": b"<html>404</html>", "empty": b""}.get(how, whole[: len(whole) // 2]))
    with pytest.raises(
        UserError, match=r"a\.(pth|safetensors) is no whole .*fetch it again"
    ) as told:
        import_backbone(path)
    assert "\n" not in str(told.value)


def test_no_file_no_layout_no_network(tmp_path):
    with pytest.raises(UserError, match=r"no file .*none\.pth"):
        import_backbone(tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"no layout 'vicreg'; --layout may be contramask, mocov3"):
        imported(tmp_path, vit().state_dict(), layout="vicreg")
    with pytest.raises(UserError, match=r"read as timm, holds student, no teacher; choose --net"):
        imported(tmp_path, vit().state_dict(), net="teacher")
    with pytest.raises(UserError, match=r"read as mocov3, holds no network"):
        imported(tmp_path, vit().state_dict(), layout="mocov3")
