"""`contramask probe`: what can be read from frozen features, each kind in its own file."""

import difflib
import importlib
from collections.abc import Sequence

from rich.console import Console

from contramask.types import UserError

# kind -> (module, what it does)
KINDS = {
    "linear": ("probe_linear", "accuracy of a linear layer"),
    "knn": ("probe_knn", "accuracy of the nearest neighbours"),
    "patches": ("probe_patches", "few-shot segmentation from single patches, layer by layer"),
    "retrieval": ("probe_retrieval", "patches, images of a class and distorted copies found again"),
    "robustness": ("probe_robustness", "accuracy on degraded images; shape against texture"),
    "track": ("probe_track", "objects followed through videos, instances found again"),
}


def main(argv: Sequence[str]) -> None:
    """Probe a model; print the result and write it beside the run."""
    if not argv or argv[0] in ("-h", "--help"):
        Console().print(usage(), highlight=False, markup=False)
        return
    kind, rest = argv[0], list(argv[1:])
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(KINDS)}"
        raise UserError(f"no probe {kind!r}; {hint}")
    importlib.import_module(f"contramask.cli.{KINDS[kind][0]}").main(rest)


def usage() -> str:
    """The text of `contramask probe --help`."""
    width = max(map(len, KINDS))
    kinds = "\n".join(f"  {kind:<{width}}  {text}" for kind, (_, text) in KINDS.items())
    return (
        "usage: contramask probe KIND RUN --data.train SHARDS --data.val SHARDS [options]\n\n"
        f"{kinds}\n\n"
        "RUN is a run directory, a folder with backbone.safetensors and backbone.yaml, or a\n"
        "checkpoint of a known official layout. contramask probe KIND --help tells the options.\n"
    )
