"""Hooks that shrink what modules compute, at once, while a backbone runs."""

import fnmatch
import re
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from contramask.analysis.analysis import Analysis, Tap
from contramask.models.attention import attend
from contramask.models.backbone import Backbone
from contramask.types import Spec, Tokens, UserError

Found = dict[str, dict[str, dict[str, Tensor]]]  # analysis -> tap -> layer -> shrunk

_BLOCK = re.compile(r"^blocks\.(\d+)(?=\.|$)")


def label(site: str) -> str:
    """`blocks.3.attn.qkv` as `block_03.attn.qkv`, which sorts by depth."""
    return _BLOCK.sub(lambda found: f"block_{int(found[1]):02d}", site)


@contextmanager
def recording(
    backbone: Backbone, analyses: Mapping[str, Analysis], view: str, spec: Spec
) -> Generator[tuple[Found, Any]]:
    """Hooks for the taps of one view; gives what is found, and a function for the final tokens.

    Args:
        backbone: in eval mode, eager.
        analyses: by name.
        view: of the images, see `views.transform`.
        spec: the sizes of the backbone, with the grid of the images at hand.

    Raises:
        UserError: for a pattern that no module matches, or attention of a backbone without it.
    """
    found: Found = {}
    finals: list[tuple[str, str, Tap]] = []
    with ExitStack() as stack:
        for name, analysis in analyses.items():
            for key, tap in analysis.taps(spec).items():
                if tap.view != view:
                    continue
                into = found.setdefault(name, {}).setdefault(key, {})
                if tap.kind == "tokens":
                    finals.append((name, key, tap))
                    continue
                for layer, module in targets(backbone, tap).items():
                    stack.callback(_hook(module, tap, layer, into).remove)

        def final(tokens: Tokens) -> None:
            for name, key, tap in finals:
                found[name][key]["final"] = tap.reduce(tokens, "final")

        yield found, final


def targets(backbone: Backbone, tap: Tap) -> dict[str, nn.Module]:
    """The modules a tap reads, by layer, in the order of the network."""
    if tap.kind == "attention":
        blocks = backbone.attentions()
        if not blocks:
            raise UserError(
                f"analysis: {type(backbone).__name__} has no attention to read; leave attention "
                "out of --analyses"
            )
        named = {f"block_{i:02d}": module for i, module in enumerate(blocks)}
        return {n: m for n, m in named.items() if fnmatch.fnmatchcase(n, tap.pattern)}
    sites = backbone.sites()
    chosen = {label(n): m for n, m in sites.items() if matches(n, tap.pattern)}
    if not chosen:
        kinds = dict.fromkeys(_BLOCK.sub("blocks.*", name) for name in sites if name)
        raise UserError(
            f"analysis: no module matches {tap.pattern!r}; there are {', '.join(kinds)}; set the "
            "pattern of the analysis"
        )
    return chosen


def matches(site: str, pattern: str) -> bool:
    """Part by part between the dots: `blocks.*` are blocks and not what is in them."""
    names, patterns = site.split("."), pattern.split(".")
    return len(names) == len(patterns) and all(map(fnmatch.fnmatchcase, names, patterns))


def _hook(module: nn.Module, tap: Tap, layer: str, into: dict[str, Tensor]) -> Any:
    if tap.kind == "input":

        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            into[layer] = tap.reduce(args[0], layer)

        return module.register_forward_pre_hook(before)
    if tap.kind == "attention":

        def beside(
            module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor
        ) -> None:
            into[layer] = tap.reduce(attend(module, args[0], kwargs.get("attn_mask")), layer)

        return module.register_forward_hook(beside, with_kwargs=True)

    def after(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        into[layer] = tap.reduce(output, layer)

    return module.register_forward_hook(after)
