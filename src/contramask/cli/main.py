"""The command line: plain verbs, each in its own file, imported when it is called."""

import difflib
import importlib
import sys
from collections.abc import Sequence

from contramask import __version__
from contramask.callbacks.signals import inbox
from contramask.errors import UserError

# verb -> (module, what it does). Help must answer at once: nothing here may import torch.
VERBS = {
    "quickstart": ("quickstart", "the whole story on an embedded data set, in minutes"),
    "pack": ("pack", "images to WebDataset shards with an index; check shards"),
    "pretrain": ("pretrain", "train a ViT by contrastive, masked or hybrid objectives"),
    "finetune": ("finetune", "train all weights of a run to name classes, also from few labels"),
    "probe": ("probe", "what frozen features hold: linear, k-NN, patches, retrieval, video ..."),
    "evaluate": ("evaluate", "a suite of probes of one or several models: a table"),
    "analyze": ("analyze", "CKA, attention, spectra, classes by depth of a model: a report"),
    "compare": ("compare", "the same of several models, and what they have in common"),
    "convert": ("convert", "weights of others into a backbone, and ours for timm or ONNX"),
    "tokenizer": ("tokenizer", "fit the visual words that BEiT predicts"),
    "doctor": ("doctor", "versions, devices, cluster, data: what is there and what is wrong"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a verb; a mistake of the user is told in one line and ends with status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(overview())
        return
    if arguments[0] in ("-V", "--version"):
        sys.stdout.write(f"contramask {__version__}\n")
        return
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"verbs are {', '.join(VERBS)}"
        fail(f"no verb {verb!r}; {hint}")
    if argv is None and verb in ("pretrain", "finetune"):
        # SLURM may warn a job while it imports; the default answer to SIGUSR1 is death.
        inbox.watch()
    module = importlib.import_module(f"contramask.cli.{VERBS[verb][0]}")
    try:
        module.main(rest)
    except UserError as error:
        fail(str(error))


def overview() -> str:
    """The text of `contramask --help`."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items())
    return (
        f"contramask {__version__}: pretrain ViTs by contrastive, masked and hybrid objectives\n\n"
        f"usage: contramask VERB [options]\n\n{verbs}\n\n"
        "contramask VERB --help tells a verb's options; start with contramask quickstart\n"
    )


def fail(message: str) -> None:
    """End with a line on standard error and status 2."""
    sys.stderr.write(f"contramask: error: {message}\n")
    sys.exit(2)
