"""How much tensors made inside a piece of work hold at most."""

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class Held(TorchFunctionMode):
    """Counts bytes of living storages after every operation; those that were there count nothing.

    torch's profiler tells the same, but takes seconds to start.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[StorageWeakRef, int] = {}
        self.most = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self.bytes.setdefault(StorageWeakRef(tensor.untyped_storage()), 0)
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.bytes.setdefault(StorageWeakRef(storage), storage.nbytes())
        self.bytes = {ref: n for ref, n in self.bytes.items() if not ref.expired()}
        self.most = max(self.most, sum(self.bytes.values()))
        return found


def peak(work: Callable[[], object]) -> int:
    """Bytes of all tensors that `work` makes, where they are most."""
    with Held() as held:
        work()
    return held.most
