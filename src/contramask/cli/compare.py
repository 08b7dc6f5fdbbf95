"""`contramask compare`: `contramask analyze` of two models and more."""

from collections.abc import Sequence

from contramask.cli import analyze


def main(argv: Sequence[str]) -> None:
    """Compare."""
    analyze.main(argv, least=2)
