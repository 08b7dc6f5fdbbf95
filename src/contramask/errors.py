"""Mistakes of users. Free of heavy imports, so that the command line can catch them early."""


class UserError(ValueError):
    """A mistake of the user in one line: what was given, what is allowed, where to change it.

    The command line prints the message alone; from Python it is an ordinary `ValueError`.
    """
