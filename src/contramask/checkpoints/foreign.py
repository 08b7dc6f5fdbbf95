"""Checkpoints of others: tensors by name, and nothing run to get them.

`torch.load(weights_only=True)` builds tensors and plain values only. Some authors also saved their
arguments as objects; a fixed list of such classes can be allowed, and even then none is built: an
inert stand-in takes the place of each, because nothing of them is read.
"""

import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from contramask.types import UserError

# What is no weight of any network, by its name at the top of a file.
BOOKKEEPING = re.compile(
    r"opt|optim(izer)?s?(_states?)?|(grad_|fp16_)?scaler|amp(_.*)?|(lr_|wd_)?schedulers?|loops|"
    r"callbacks|hyper_parameters|args|config|cfg|rng.*|(dino_|ibot_|koleo_)?loss|criterion"
)
WRAPPERS = ("state_dict", "model")  # names around a whole network, which say nothing of it
ENVELOPES = ("_orig_mod", "module")  # of torch.compile and of DistributedDataParallel


class Inert:
    """Stands where a file wants an object: takes any state, keeps none, does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> "Inert":
        return object.__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# What --allow may name, and what is built instead. No entry is the thing itself.
ALLOWED: dict[str, type] = {
    "argparse.Namespace": Inert,
    "yacs.config.CfgNode": OrderedDict,  # a dict: torch fills no other class item by item
    "omegaconf.dictconfig.DictConfig": Inert,
    "omegaconf.listconfig.ListConfig": Inert,
    "omegaconf.base.ContainerMetadata": Inert,
    "omegaconf.base.Metadata": Inert,
    "omegaconf.nodes.AnyNode": Inert,
    "typing.Any": Inert,
    "collections.defaultdict": OrderedDict,
    "pytorch_lightning.utilities.parsing.AttributeDict": OrderedDict,
    "lightning_fabric.utilities.data.AttributeDict": OrderedDict,
    "lightning.fabric.utilities.data.AttributeDict": OrderedDict,
    "pathlib.PosixPath": Inert,
    "pathlib._local.PosixPath": Inert,
    "numpy.dtype": Inert,
    "numpy.core.multiarray.scalar": Inert,
    "numpy._core.multiarray.scalar": Inert,
    "numpy.dtypes.Float64DType": Inert,
    "numpy.dtypes.Float32DType": Inert,
    "numpy.dtypes.Int64DType": Inert,
    "_codecs.encode": Inert,
}


@dataclass(frozen=True)
class Foreign:
    """What a file holds: all tensors by dotted name, and what was left aside."""

    path: Path
    tensors: dict[str, Tensor]
    aside: dict[str, Any]  # bookkeeping by its name at the top

    @property
    def step(self) -> int:
        """Weight updates, where the file says."""
        step = self.aside.get("global_step", 0)
        return step if isinstance(step, int) else 0


def read(path: Path, allow: Sequence[str] = ()) -> Foreign:
    """All tensors of a `.safetensors` file or of one by `torch.save`.

    Names are joined by dots, without wrappers: `state_dict`, `model`, `module.`, `_orig_mod.`.

    Args:
        path: the file.
        allow: names of `ALLOWED` whose objects may be passed over.

    Raises:
        UserError: no such file, damaged, or holding objects that are not allowed.
    """
    for name in allow:
        if name not in ALLOWED:
            raise UserError(
                f"--allow {name}: only what is known to be harmless can be allowed, namely "
                f"{', '.join(ALLOWED)}; ask the authors for the weights alone"
            )
    if not path.is_file():
        raise UserError(f"no file {path}; give a checkpoint, .pth, .pt, .ckpt or .safetensors")
    content = _safetensors(path) if path.suffix == ".safetensors" else _torch(path, allow)
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise UserError(f"{path} holds a {kind}, no tensors by name: give a state dict")
    tensors: dict[str, Tensor] = {}
    aside: dict[str, Any] = {}
    for name, value in content.items():
        top = str(name)
        if BOOKKEEPING.fullmatch(top) or not any(_tensors(value)):
            aside[top] = value
            continue
        _add(tensors, "" if top in WRAPPERS and isinstance(value, Mapping) else top, value, path)
    return Foreign(path, tensors, aside)


def _add(tensors: dict[str, Tensor], name: str, value: Any, path: Path) -> None:
    """Put the tensors of a tree under their dotted names."""
    if isinstance(value, Tensor):
        short = ".".join(part for part in name.split(".") if part not in ENVELOPES)
        if short in tensors:
            raise UserError(f"{path} holds {short} twice, in two wrappers; keep one of them")
        tensors[short] = value.detach()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _add(tensors, f"{name}.{key}" if name else str(key), item, path)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _add(tensors, f"{name}.{i}", item, path)


def _tensors(value: Any) -> Iterator[bool]:
    """True for each tensor in a tree."""
    if isinstance(value, Tensor):
        yield True
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is no whole safetensors file: {error}; fetch it again") from error


def _torch(path: Path, allow: Sequence[str]) -> Any:
    stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        (ALLOWED[name], name) for name in allow
    ]
    try:
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            # torch's remarks on old pickles: what cannot be read becomes an error below.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise _refused(path, allow, str(error)) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        told = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is no whole file of torch.save: {told}; fetch it again") from error


def _refused(path: Path, allow: Sequence[str], told: str) -> UserError:
    wanted = {m for m in re.findall(r"GLOBAL ([\w.]+)", told) if m not in allow}
    # All of them, where the format lets them be listed without loading.
    with suppress(RuntimeError, ValueError, UnpicklingError):
        wanted |= set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - set(allow)
    if not wanted:
        line = told.splitlines()[-1].strip() if told else "no pickle of torch"
        return UserError(f"{path} is no whole file of torch.save: {line[:200]}; fetch it again")
    harmful = sorted(wanted - ALLOWED.keys())
    start = f"{path} holds objects, so loading it could run code; nothing was run."
    if harmful:
        return UserError(
            f"{start} It wants {', '.join(harmful)}, which cannot be allowed; ask the authors for "
            "the weights alone"
        )
    options = " ".join(f"--allow {name}" for name in sorted(wanted | set(allow)))
    return UserError(f"{start} If you expect them there, pass over them by {options}")
