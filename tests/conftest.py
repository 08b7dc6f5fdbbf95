"""The strict world of the tests: one thread, real data where it is, sizes that all differ."""

import io
import lzma
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

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

    Of those beside the tests (scripts/reduce_parity.py), large results are thinned to {shape,
    stride, values, norm, max}; others are files too large for a repository, or a skip says why.
    """

    def load(name: str) -> dict:
        reduced = REPO / "tests" / "parity" / f"{name}.pt.xz"
        if reduced.is_file():
            planes = np.frombuffer(lzma.decompress(reduced.read_bytes()), np.uint8)
            plain = planes.reshape(4, -1).T.tobytes()
            return torch.load(io.BytesIO(plain), weights_only=True)
        root = Path(os.environ.get("CONTRAMASK_PARITY", REPO.parent / "shared" / "parity"))
        path = root / f"{name}.pt"
        if not path.is_file():
            pytest.skip(f"no {path}: set CONTRAMASK_PARITY to the folder that holds {name}.pt")
        return torch.load(path, weights_only=True)

    return load
