"""Words that are not known are refused in one line, from Python as from a file."""

import os
import subprocess
import sys
from typing import Literal

import pytest

from contramask.errors import UserError, need_one_of
from tests.conftest import REPO

UNKNOWN = {
    "Optim(name='adam')": "optim: name is 'adam'; there are adamw, sgd, lars, lars_classic; "
    "set model.optim.name",
    "Optim(scaling='root')": "optim: scaling is 'root'; there are linear, sqrt; "
    "set model.optim.scaling",
    "Rule(freeze_by='lr')": "optim rule: freeze_by is 'lr'; there are skip, rate; "
    "set model.optim.rules",
    "Clip(1.0, per='head')": "optim: clip.per is 'head'; there are model, module, tensor; "
    "set model.optim.clip.per",
    "Schedule(1.0, shape='line')": "schedule: shape is 'line'; there are cosine, linear, constant, "
    "steps; set shape where the schedule is given",
    "VariedBlockMasking(SPEC, shape='blocks')": "mask shape is 'blocks'; there are block, random; "
    "set model.masks.NAME.init_args.shape",
    "IBOT(SPEC, mask='m', targets='center')": "iBOT: targets is 'center'; there are centre, "
    "sinkhorn; set model.objectives.NAME.init_args.targets",
    "IBOT(SPEC, mask='m', patch_centre='no')": "iBOT: patch_centre is 'no'; there are all, masked; "
    "set model.objectives.NAME.init_args.patch_centre",
    "IBOT(SPEC, mask='m', out=9, sharing='both')": "heads: sharing is 'both'; there are shared, "
    "split, separate; set model.objectives.NAME.init_args.sharing",
    "tiny_vit(drop_path='even')": "drop_path is 'even'; there are growing, uniform, subset; "
    "set model.backbone.init_args.drop_path",
    "pretraining(ema='later')": "model: ema is 'later'; there are before, after; set model.ema",
}
# In a program of its own: in this one, annotations are checked before our code is reached.
PROGRAM = """
import sys
from contramask.masks import VariedBlockMasking
from contramask.objectives.ibot import IBOT
from contramask.optim import Clip, Optim, Rule
from contramask.schedule import Schedule
from contramask.types import UserError
from tests.builders import SPEC, pretraining, tiny_vit
for call in sys.argv[1:]:
    try:
        eval(call)
    except UserError as error:
        print(error)
    else:
        print("accepted")
"""


def test_one_of():
    words = Literal["one", "two"]
    need_one_of("two", words, "number", "it")
    for given in ("three", None, ["one"]):
        with pytest.raises(UserError, match=r"number is .*; there are one, two; set it$"):
            need_one_of(given, words, "number", "it")


def test_unknown_words():
    command = [sys.executable, "-c", PROGRAM, *UNKNOWN]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=REPO, env=environment, timeout=200
    )
    assert done.stdout.splitlines() == list(UNKNOWN.values()), done.stderr
