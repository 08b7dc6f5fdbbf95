"""The parser of verbs that take YAML: one line for a mistake, with the nearest names that exist."""

import difflib
import importlib
import inspect
import re
from typing import Any, NoReturn

import jsonargparse
import yaml

from contramask.errors import UserError

_OPTION = re.compile(r"Option '([\w.-]+)' is not accepted")
_GROUP = re.compile(r"Group '([\w.]+)' does not accept option '([\w.]+)'")
_CLASS = re.compile(r"class_path='([\w.]+)'")
_KEY = re.compile(r"""(?:Key|key|group) ['"]?([\w.-]+)['"]? (?:is )?not (?:expected|accepted)""")
_UNKNOWN = re.compile(r"(?:unrecognized arguments:|Unrecognized arguments:) --([\w.+-]+)")


class ConfigFile(jsonargparse.ActionConfigFile):  # pyright: ignore[reportPrivateImportUsage]
    """A YAML of options, whose `data.views` may be the path of another YAML.

    jsonargparse keeps that path as an entry beside the views, and takes it for a view when a dotted
    option changes one (`--data.views.global.size 96`).
    """

    @staticmethod
    def apply_config(parser: Any, cfg: Any, dest: str, value: str) -> None:
        super(ConfigFile, ConfigFile).apply_config(parser, cfg, dest, value)
        views = cfg.get("data.views")
        if isinstance(views, dict):
            views.pop("__path__", None)


class Parser(jsonargparse.ArgumentParser):
    """A jsonargparse parser whose errors are one line that names the nearest valid names."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def build(self, config: jsonargparse.Namespace) -> jsonargparse.Namespace:
        """Instantiate what the configuration describes. Raises `UserError`."""
        try:
            return self.instantiate(config)
        except UserError:
            raise
        except ValueError as error:  # jsonargparse's wrapping of what a dataclass refused
            raise UserError(_plain(str(error))) from error

    def plain(self, config: jsonargparse.Namespace) -> dict[str, Any]:
        """The whole configuration with its defaults, as plain values."""
        return yaml.safe_load(self.dump(config, skip_unset=False))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a `UserError` in place of usage and exit."""
        if isinstance(ex, UserError):
            raise ex
        for cause in _chain(ex):
            if isinstance(cause, UserError):
                raise cause
        text = " ".join(message.split())
        plain = _plain(message)
        raise UserError(plain if "did you mean" in plain else f"{plain}{self._hint(text)}")

    def _hint(self, text: str) -> str:
        option = _OPTION.search(text)
        if option:
            found = _CLASS.search(text)
            return _near(option[1], _parameters(found[1]) if found else self.names())
        group = _GROUP.search(text)
        if group:
            return _near(f"{group[1]}.{group[2]}", self.names())
        for pattern in (_UNKNOWN, _KEY):
            found = pattern.search(text)
            if found:
                return _near(found[1].rstrip("+").split("=")[0], self.names())
        return ""

    def names(self) -> list[str]:
        """The options there are."""
        hidden = ("help", "print_config", "print_shtab")
        return [a.dest for a in self._actions if a.dest.rpartition(".")[2] not in hidden]


def _plain(message: str) -> str:
    """One line of jsonargparse's tree of alternatives: where, and the reason that tells most."""
    lines = [line.strip().removeprefix("- ") for line in message.strip().splitlines()]
    noise = ("Does not validate", "Subtypes:", "Errors:", "Expected a <class", "Given value type")
    told = [x for x in lines if x and not x.startswith((*noise, "Expected a path", "Given value:"))]
    where = [x for x in told if x.startswith("Parser key") and x.endswith(":")]
    reasons = [x for x in told if x not in where] or lines[:1]
    given = [x.removeprefix("Given value: ") for x in lines if x.startswith("Given value: ")]
    text = " ".join([*where, "; ".join(dict.fromkeys(reasons))])
    short = given and "Namespace(" not in given[0] and "NestedArg" not in given[0]
    return f"{text} (given {given[0]})" if short and given[0] not in text else text


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _parameters(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    cls: Any = getattr(importlib.import_module(module), name)
    return [n for n in inspect.signature(cls).parameters if n not in ("self", "spec")]


def _near(given: str, names: list[str]) -> str:
    near = difflib.get_close_matches(given, names, n=3, cutoff=0.6)
    if not near:  # a wrong group hides a right last word
        last = given.rsplit(".", 1)[-1]
        near = [n for n in names if n.rsplit(".", 1)[-1] == last][:3]
    if near:
        return f" (did you mean {' or '.join(near)}?)"
    return f" (there are {', '.join(names)})" if len(names) <= 20 else ""
