"""Names of result files: two plans of one probe do not write the same file."""

from collections.abc import Mapping
from typing import Any

from contramask.probes.features import Feature
from contramask.probes.store_files import identity


def words_of(feature: Feature) -> str:
    """A feature in the name of a file: `last-cls-mean-final`."""
    return str(feature).replace("/", "-").replace("+", "-")


def result_name(stem: str, plan: Mapping[str, Any], default: Mapping[str, Any]) -> str:
    """The stem, and eight hexadecimal digits of what is not default in the plan.

    Args:
        stem: what is in words, e.g. `linear-last-cls-final`.
        plan: name -> what the number hangs on; its `repr` counts.
        default: what each is where nothing is said.
    """
    other = {k: repr(v) for k, v in plan.items() if k not in default or default[k] != v}
    return f"{stem}-{identity(other)[:8]}" if other else stem
