"""How far we are from the authors' numbers: asserted in each test, told at the end of the run."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

Row = tuple[str, str, str, float, float]  # method, quantity, measure, worst, allowed


@pytest.fixture
def close(request) -> Callable[..., None]:
    """`close("loss", found, expected, relative=1e-5)`: within the limit, and recorded.

    `expected` is a number, a tensor or a thinned one (scripts/reduce_parity.py), of which the kept
    entries and the norm of all are compared. One limit is given: `absolute`, `relative` (entry by
    entry) or `of_max` (of the largest expected entry). The method is the file's: test_METHOD.py.
    """
    method = request.node.path.stem.removeprefix("test_")

    def check(quantity: str, found: Any, expected: Any, name: str = "", **limit: float) -> None:
        [(measure, allowed)] = limit.items()
        worst = deviation(found, expected, measure)
        row: Row = (method, quantity, measure, worst, allowed)
        request.node.user_properties.append(("deviation", row))
        assert worst <= allowed, f"{quantity} {name}: {worst:.2g} {measure}, allowed {allowed:.2g}"

    return check


def deviation(found: Any, expected: Any, measure: str) -> float:
    """The largest difference, in the given measure."""
    found = torch.as_tensor(found).detach().double()
    if isinstance(expected, Mapping):
        assert found.numel() == torch.Size(expected["shape"]).numel()
        scale = expected["max"]
        # Whatever was not kept shows in the norm, which is as near as all entries together.
        entries = found.flatten()[:: expected["stride"]]
        norm = abs(found.norm().item() - expected["norm"]) / found.numel() ** 0.5
        worst = _worst(entries, expected["values"].double(), measure, scale)
        return max(worst, norm / (scale if measure == "of_max" else 1.0) if norm else 0.0)
    expected = torch.as_tensor(expected).double()
    # Authors keep leading axes of one (class token, positions); ours are without.
    found, expected = _without_leading_ones(found), _without_leading_ones(expected)
    assert found.shape == expected.shape, f"{found.shape} and {expected.shape}"
    return _worst(found, expected, measure, expected.abs().max().item())


def _without_leading_ones(tensor: Tensor) -> Tensor:
    while tensor.ndim > 1 and len(tensor) == 1:
        tensor = tensor[0]
    return tensor


def _worst(found: Tensor, expected: Tensor, measure: str, scale: float) -> float:
    difference = (found - expected).abs()
    match measure:
        case "absolute":
            return difference.max().item()
        case "relative":
            return (difference / expected.abs()).max().item()
        case "of_max":
            return difference.max().item() / scale
    raise ValueError(f"a limit is absolute, relative or of_max, not {measure}")


def pytest_terminal_summary(terminalreporter) -> None:
    """A line for each method and quantity that was compared: the worst of all its tests."""
    worst: dict[tuple[str, str, str], tuple[float, float]] = {}
    for status in ("passed", "failed"):
        for report in terminalreporter.getreports(status):
            for name, row in report.user_properties if report.when == "call" else ():
                if name == "deviation":
                    method, quantity, measure, found, allowed = row
                    before = worst.get((method, quantity, measure), (-1.0, 0.0))
                    key = (method, quantity, measure)
                    worst[key] = max(before, (found, allowed))
    if not worst:
        return
    terminalreporter.section("deviation from the authors' code")
    for (method, quantity, measure), (found, allowed) in sorted(worst.items()):
        line = f"{method:<10} {quantity:<28} {found:8.1e}  of {allowed:7.0e} allowed, {measure}"
        terminalreporter.write_line(line)
