"""Mistakes of users. Free of heavy imports, so that the command line can catch them early."""

from typing import Any, get_args


class UserError(ValueError):
    """A mistake of the user in one line: what was given, what is allowed, where to change it.

    The command line prints the message alone; from Python it is an ordinary `ValueError`.
    """


def need_one_of(given: object, allowed: Any, what: str, where: str) -> None:
    """Raise a `UserError` unless `given` is one of the values of a `Literal`.

    Args:
        given: what was given.
        allowed: the type, e.g. `Literal["linear", "sqrt"]`.
        what: its name, in front of " is ...".
        where: where to change it, behind "set ".
    """
    values = get_args(allowed)
    if given not in values:
        raise UserError(f"{what} is {given!r}; there are {', '.join(values)}; set {where}")
