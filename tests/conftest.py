"""The strict world of the tests: one thread, real data where it is, sizes that all differ."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from scripts.reduce_parity import load_reduced

# No test is timed: a busy machine is no mistake.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

pytest_plugins = ["tests.parity.deviations"]
REPO = Path(__file__).resolve().parents[1]


def data_root() -> Path:
    """Where the real images are: $CONTRAMASK_DATA, else beside the repository."""
    return Path(os.environ.get("CONTRAMASK_DATA", REPO.parent / "shared" / "data"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Bitwise comparisons need one order of summation whatever the machine.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data():
    """`shared_data("cifar10")`: the folder of a real data set, or a skip that says why."""

    def find(name: str) -> Path:
        folder = data_root() / name
        if not folder.is_dir():
            pytest.skip(f"no {folder}: set CONTRAMASK_DATA to the folder that holds {name}/")
        return folder

    return find


@pytest.fixture(scope="session")
def parity():
    """`parity("mae")`: tensors made by the authors' own code.

    Beside the tests lie reduced copies (scripts/reduce_parity.py), whose large results are thinned
    to {shape, stride, values, norm, max}. The full files are read where CONTRAMASK_PARITY names
    their folder, and where there is no reduced copy; a skip says so where there is neither.
    """

    def load(name: str) -> dict:
        reduced = REPO / "tests" / "parity" / f"{name}.pt.xz"
        if reduced.is_file() and "CONTRAMASK_PARITY" not in os.environ:
            return load_reduced(reduced)
        root = Path(os.environ.get("CONTRAMASK_PARITY", REPO.parent / "shared" / "parity"))
        path = root / f"{name}.pt"
        if not path.is_file():
            pytest.skip(f"no {path}: set CONTRAMASK_PARITY to the folder that holds {name}.pt")
        return torch.load(path, weights_only=True)

    return load
