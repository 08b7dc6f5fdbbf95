"""What of a configuration may differ between the parts of one run, and what must not."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

# What may differ between the parts of one run: where and how fast it runs, what is watched; never
# what is learned. Patterns of dotted keys.
FREE = (
    "config*",
    "name",
    "root",
    "resume",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accumulate_grad_batches",  # the images of an update are checked when training starts
    "trainer.strategy*",
    "trainer.plugins*",
    "trainer.callbacks*",  # observers; they leave training bitwise as it is
    "trainer.logger*",
    "trainer.profiler*",
    "trainer.log_every_n_steps",
    "trainer.enable_*",
    "trainer.limit_val_batches",
    "trainer.val_check_interval",
    "trainer.check_val_every_n_epoch",
    "trainer.num_sanity_val_steps",
    "trainer.default_root_dir",
    "tracking*",
    "data.workers",
    "data.streaming.prefetch",
    "data.streaming.context",
)
# Files that may lie in another directory (staged to a local disk, say) under the same name.
MOVABLE = ("data.train", "data.val", "data.streaming.index")
WHY = {
    "trainer.max_steps": "schedules are functions of step / max_steps: another length is another "
    "run from its first step on"
}


def differences(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    free: Sequence[str] = (),
    movable: Sequence[str] = (),
) -> list[str]:
    """Lines `key: before -> after (why)` for the keys that must not differ, and do."""
    old, new = _flat(before, movable), _flat(after, movable)
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if _any_of(free, key):
            continue
        a, b = old.get(key, "not set"), new.get(key, "not set")
        if a != b:
            lines.append(f"{key}: {a} -> {b}" + (f" ({WHY[key]})" if key in WHY else ""))
    return lines


def _flat(config: object, movable: Sequence[str], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key; a list is a leaf unless it holds mappings."""
    if _any_of(movable, prefix):
        return {prefix: _file_names(config)}
    if isinstance(config, Mapping) and config:
        pairs = [(str(key), value) for key, value in config.items()]
    elif isinstance(config, list | tuple) and any(isinstance(x, Mapping) for x in config):
        pairs = [(str(i), value) for i, value in enumerate(config)]
    else:
        return {prefix: list(config) if isinstance(config, tuple) else config}
    flat = {}
    for key, value in pairs:
        flat |= _flat(value, movable, f"{prefix}.{key}" if prefix else key)
    return flat


def _any_of(patterns: Sequence[str], key: str) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _file_names(value: object) -> object:
    """Paths without their directories, also in lists, `::` lists, and as keys."""
    if isinstance(value, str):
        return "::".join(part.rsplit("/", 1)[-1] for part in value.split("::"))
    if isinstance(value, Mapping):
        return {_file_names(key): weight for key, weight in value.items()}
    return [_file_names(item) for item in value] if isinstance(value, list) else value
