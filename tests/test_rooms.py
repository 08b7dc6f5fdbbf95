"""The rules of the house, read from the source by `ast`: who imports whom, what nobody writes.

Each rule is a function of (path inside the package, source) that yields one line a breach. Each is
first held against snippets that break it and snippets that do not, so that no rule passes by being
blind.
"""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "contramask"

# Rooms in the order in which they may be known: each may import those before it, and itself.
ROOMS = [
    "__version__", "errors", "types", "schedule", "distributed", "functional", "optim",
    "models", "masks", "data",
    "objectives", "probes", "analysis",
    "checkpoints", "tracking", "report", "training", "callbacks",
    "cli", "__main__",
]  # fmt: skip

# Rooms that do not know each other although one stands before the other.
STRANGERS = {
    ("data", "models"), ("data", "masks"), ("data", "optim"),
    ("objectives", "data"), ("objectives", "optim"), ("objectives", "masks"),
    ("probes", "data"), ("probes", "objectives"), ("probes", "masks"),
    ("analysis", "data"), ("analysis", "objectives"), ("analysis", "masks"),
    ("tracking", "models"), ("tracking", "objectives"), ("tracking", "data"),
    ("report", "tracking"), ("report", "data"),
}  # fmt: skip

LIGHTNING = ("training/", "callbacks/", "tracking/", "checkpoints/", "data/module.py", "cli/")

# Third-party packages and where they may come in. An empty tuple: nowhere.
DOORS: dict[str, tuple[str, ...]] = {
    "timm": ("models/vit.py", "data/augmenting.py"),
    "scipy": ("models/positions.py",),
    "sklearn": ("analysis/plane.py",),
    "webdataset": ("data/shards.py",),
    "wandb": ("tracking/wandb.py",),
    "matplotlib": ("report/",),
    "jsonargparse": ("cli/",),
    "pytorch_lightning.cli": ("cli/",),
    "pytorch_lightning": LIGHTNING,
    "cv2": ("data/",),
    "simplejpeg": ("data/",),
    "lightning": (),  # two releases under this name were malware; ours is pytorch_lightning
    "pickle": (),  # but for the name of its error, which torch.load raises
    "cloudpickle": (),
    "dill": (),
    "shelve": (),
    "marshal": (),
}

LINES_OF_FILE, LINES_OF_FUNCTION = 250, 40
NAMELESS = {"utils", "helpers", "common", "base", "misc", "manager", "tools"}

Rule = Callable[[str, str], Iterator[str]]


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, full name) of all that is imported anywhere in a file, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value


def called(call: ast.Call) -> str:
    """The last word of what is called: `load` for torch.load(...)."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def room_of(path: str) -> str:
    return path.split("/", maxsplit=1)[0].removesuffix(".py")


def inside(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or (place[-1] == "/" and path.startswith(place)) for place in places)


def one_way(path: str, source: str) -> Iterator[str]:
    """Imports inside the package point to rooms further down."""
    here = room_of(path)
    for line, name in imports(source):
        root, _, rest = name.partition(".")
        if root != "contramask" or here == "__init__":
            continue
        there = rest.partition(".")[0]
        if there == here:
            continue
        if there not in ROOMS or here not in ROOMS:
            yield f"{line}: {here} or {there} is no room; put it in its place in ROOMS"
        elif ROOMS.index(there) > ROOMS.index(here) or (here, there) in STRANGERS:
            yield f"{line}: {here} must not import {there}"


def one_door(path: str, source: str) -> Iterator[str]:
    """Third-party packages come in through their door."""
    for line, name in imports(source):
        if name == "pickle.UnpicklingError":
            continue
        for package, doors in DOORS.items():
            if f"{name}.".startswith(f"{package}.") and not inside(path, doors):
                where = " or ".join(doors) or "nowhere"
                yield f"{line}: {package} may be imported in {where}"


def objectives_see_no_backbone(path: str, source: str) -> Iterator[str]:
    """An objective knows a backbone's `Spec` only."""
    if room_of(path) != "objectives":
        return
    for line, name in imports(source):
        if name.startswith(("contramask.models.vit", "contramask.models.backbone")):
            yield f"{line}: an objective imports {name}"


def absolute_imports(path: str, source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield f"{node.lineno}: relative import"


def short_files(path: str, source: str) -> Iterator[str]:
    lines = len(source.splitlines())
    if lines > LINES_OF_FILE:
        yield f"{lines} lines; at most {LINES_OF_FILE}"


def short_functions(path: str, source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node) is not None:  # what explains it does not make it long
                text = node.body[0]
                lines -= (text.end_lineno or text.lineno) - text.lineno + 1
            if lines > LINES_OF_FUNCTION:
                yield f"{node.lineno}: {node.name} has {lines} lines; at most {LINES_OF_FUNCTION}"


def no_forbidden_calls(path: str, source: str) -> Iterator[str]:
    """`hasattr` asks what a type should say; `print` is for consoles that know no progress bar."""
    for node in ast.walk(ast.parse(source)):
        plain = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if plain and called(node) in ("hasattr", "print", "eval", "exec"):
            yield f"{node.lineno}: {called(node)}"


def no_blind_except(path: str, source: str) -> Iterator[str]:
    """`except Exception` hides faults. Who catches `BaseException` to clean up raises again."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        names = [c.id for c in caught if isinstance(c, ast.Name)]
        raises = any(isinstance(n, ast.Raise) and n.exc is None for n in ast.walk(node))
        if node.type is None or "Exception" in names:
            yield f"{node.lineno}: blind except"
        elif "BaseException" in names and not raises:
            yield f"{node.lineno}: BaseException caught and not raised again"


def no_mutable_defaults(path: str, source: str) -> Iterator[str]:
    literals = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            makes = isinstance(default, ast.Call) and called(default) in ("list", "dict", "set")
            if makes or isinstance(default, literals):
                yield f"{node.lineno}: mutable default"


def weights_only(path: str, source: str) -> Iterator[str]:
    """`torch.load` runs code from a file unless told `weights_only=True`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            given = {k.arg: k.value for k in node.keywords}
            value = given.get("weights_only")
            if not (isinstance(value, ast.Constant) and value.value is True):
                yield f"{node.lineno}: torch.load without weights_only=True"
    for line, name in imports(source):
        if name == "torch.load":
            yield f"{line}: import torch and write torch.load, so that this rule sees it"


def telling_names(path: str, source: str) -> Iterator[str]:
    """A file that cannot be named has no idea."""
    words = {part.removesuffix(".py") for part in path.split("/")}
    if words & NAMELESS:
        yield f"{', '.join(words & NAMELESS)} says nothing"


RULES: dict[Rule, tuple[list[tuple[str, str]], list[tuple[str, str]]]] = {
    # rule: (snippets that break it, snippets that keep it), each (path, source)
    one_way: (
        [
            ("models/vit.py", "from contramask.training.plan import Plan"),
            ("data/views.py", "import contramask.models.vit"),
            ("types.py", "def f():\n    from contramask.data import storage"),
            ("objectives/mae.py", "from contramask import data"),
            ("types.py", "from contramask.nowhere import x"),
            ("training/linear.py", "importlib.import_module('contramask.cli.pack')"),
        ],
        [
            ("cli/pack.py", "from contramask.data.index import verify"),
            ("data/views.py", "from contramask.data import crops"),
            ("models/vit.py", "from contramask.types import Spec\nimport torch"),
        ],
    ),
    one_door: (
        [
            ("models/heads.py", "import timm"),
            ("models/heads.py", "from timm.layers import Mlp"),
            ("data/pack.py", "import webdataset as wds"),
            ("callbacks/probe.py", "def f():\n    import wandb"),
            ("training/linear.py", "from pytorch_lightning.cli import LightningCLI"),
            ("probes/knn.py", "import pytorch_lightning as pl"),
            ("training/linear.py", "import lightning"),
            ("data/shards.py", "import pickle"),
            ("data/shards.py", "from pickle import loads, UnpicklingError"),
            ("cli/pretrain.py", "import matplotlib.pyplot as plt"),
        ],
        [
            ("models/vit.py", "import timm\nfrom timm.layers import Mlp"),
            ("cli/pretrain.py", "from pytorch_lightning.cli import LightningCLI"),
            ("data/module.py", "import pytorch_lightning as pl"),
            ("report/curves.py", "import matplotlib.pyplot as plt"),
            ("models/heads.py", "import timmy"),
            ("checkpoints/files.py", "from pickle import UnpicklingError"),
        ],
    ),
    objectives_see_no_backbone: (
        [("objectives/moco.py", "from contramask.models.backbone import Backbone")],
        [("objectives/moco.py", "from contramask.models.heads import mlp")],
    ),
    absolute_imports: (
        [("models/vit.py", "from . import heads"), ("models/vit.py", "from ..types import Spec")],
        [("models/vit.py", "from contramask.models import heads")],
    ),
    short_files: ([("a.py", "x = 1\n" * 251)], [("a.py", "x = 1\n" * 250)]),
    short_functions: (
        [
            ("a.py", "def f():\n" + "    x = 1\n" * 40),
            ("a.py", "class A:\n  def f(self):\n" + "    x = 1\n" * 40),
        ],
        [
            ("a.py", "def f():\n" + "    x = 1\n" * 39),
            ("a.py", "class A:\n" + "  x = 1\n" * 60),
        ],
    ),
    no_forbidden_calls: (
        [("a.py", "if hasattr(x, 'y'): pass"), ("a.py", "print('x')"), ("a.py", "eval('1')")],
        [("a.py", "console.print('x')\nmodel.eval()\n'print(x)'")],
    ),
    no_blind_except: (
        [
            ("a.py", "try:\n    f()\nexcept:\n    pass"),
            ("a.py", "try:\n    f()\nexcept Exception as e:\n    raise"),
            ("a.py", "try:\n    f()\nexcept (OSError, Exception):\n    pass"),
            ("a.py", "try:\n    f()\nexcept BaseException:\n    pass"),
        ],
        [
            ("a.py", "try:\n    f()\nexcept (OSError, ValueError):\n    pass"),
            ("a.py", "try:\n    f()\nexcept BaseException:\n    g()\n    raise"),
        ],
    ),
    no_mutable_defaults: (
        [
            ("a.py", "def f(x=[]): ..."),
            ("a.py", "def f(*, x={}): ..."),
            ("a.py", "g = lambda x=set(): x"),
            ("a.py", "async def f(x=[i for i in y]): ..."),
        ],
        [("a.py", "def f(x=(), *, y=None, z=frozenset()): ...")],
    ),
    weights_only: (
        [
            ("a.py", "import torch\ntorch.load(p)"),
            ("a.py", "import torch\ntorch.load(p, weights_only=False)"),
            ("a.py", "import torch\ntorch.load(p, weights_only=flag)"),
            ("a.py", "from torch import load\nload(p)"),
        ],
        [("a.py", "import torch, json\ntorch.load(p, weights_only=True)\njson.load(p)")],
    ),
    telling_names: (
        [("data/utils.py", ""), ("helpers/x.py", "")],
        [("data/crops.py", ""), ("models/utilisation.py", "")],
    ),
}  # fmt: skip


def named(rule: Rule) -> str:
    return rule.__name__.replace("_", "-")


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_the_rule_sees_what_breaks_it_and_lets_the_rest_pass(rule):
    bad, good = RULES[rule]
    for path, source in bad:
        assert list(rule(path, source)), f"{named(rule)} does not see {source!r} in {path}"
    for path, source in good:
        assert not list(rule(path, source)), f"{named(rule)} refuses {source!r} in {path}"


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_the_house_keeps_the_rule(rule):
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 10
    broken = []
    for file in files:
        path = file.relative_to(PACKAGE).as_posix()
        broken += [f"{path}:{line}" for line in rule(path, file.read_text())]
    assert not broken, "\n".join(broken)


def test_every_door_leads_somewhere():
    """A door for a file that is gone would allow a new file of that name anything."""
    for doors in DOORS.values():
        for door in doors:
            assert (PACKAGE / door).exists(), door
