"""DataLoaders that are deaf to signals, start where training is, and report bad samples."""

import ctypes
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from multiprocessing.util import Finalize
from traceback import clear_frames
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, IterableDataset

from contramask.data.streaming import Streaming
from contramask.errors import UserError

log = logging.getLogger(__name__)
_NAMED = 20  # bad samples of one reason that are named in the log


@lru_cache(maxsize=4)
def exiting(context: str | None, process: int) -> Any:
    """A flag in shared memory that is raised when this process (of that number) exits.

    Python then sends SIGTERM to processes it has left, to which our workers are deaf, and waits
    for their end: without this a program would hang that an error ended amid a batch.
    """
    flag = multiprocessing.get_context(context).RawValue(ctypes.c_bool, False)
    Finalize(None, setattr, args=(flag, "value", True), exitpriority=100)
    return flag


def start_worker(parent_exits: Any, worker: int) -> None:
    """Readies a worker process: one thread, and deaf to what a scheduler sends to all processes.

    A worker that dies of a signal makes PyTorch raise in the trainer before it can save.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    threading.Thread(target=_leave_with_parent, args=(parent_exits,), daemon=True).start()


def _leave_with_parent(parent_exits: Any) -> None:
    # Looking is robust where waiting is not: an Event counts its waiters, even those that died.
    while not parent_exits.value:
        time.sleep(0.2)
    os._exit(0)


class Loader:
    """Batches of a data set that is made anew, or kept, each time one begins to read.

    Args:
        make: the data set, which yields finished batches; called when reading begins, so that it
            may ask how far training is.
        workers: processes; 0 reads in this one.
        streaming: `prefetch` and `context`.
        pin: whether batches lie in page-locked memory, for a faster copy to a GPU.
        keep: whether data set and workers serve every later reading too, until `close`.
        faults: where bad samples are counted by reason.
    """

    def __init__(
        self,
        make: Callable[[], IterableDataset[dict[str, Any]]],
        *,
        workers: int,
        streaming: Streaming,
        pin: bool = False,
        keep: bool = False,
        faults: Counter[str] | None = None,
    ) -> None:
        self.make, self.workers, self.streaming = make, workers, streaming
        self.pin, self.keep = pin, keep
        self.faults: Counter[str] = Counter() if faults is None else faults
        self.kept: DataLoader[dict[str, Any]] | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        loader = self._loader() if self.kept is None else self.kept
        if self.keep:
            self.kept = loader
        batches, mistake = iter(loader), None
        while mistake is None:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except UserError as error:
                # PyTorch puts the worker's whole traceback into the message; the last line is ours.
                mistake = str(error).strip().rsplit("UserError: ", 1)[-1]
                clear_frames(error.__traceback__)  # they hold the workers in a cycle
                continue
            self._report(batch["bad"])
            yield batch
        del batches  # ends the workers now
        raise UserError(mistake)

    def close(self) -> None:
        """Ends kept workers. Left to the garbage collector they take 5 s each to go."""
        self.kept = None

    def _loader(self) -> DataLoader[dict[str, Any]]:
        many = self.workers > 0
        return DataLoader(
            self.make(),
            batch_size=None,
            num_workers=self.workers,
            worker_init_fn=partial(start_worker, exiting(self.streaming.context, os.getpid())),
            pin_memory=self.pin,
            prefetch_factor=self.streaming.prefetch if many else None,
            persistent_workers=many and self.keep,
            multiprocessing_context=self.streaming.context if many else None,
        )

    def _report(self, bad: dict[str, list[str]]) -> None:
        for reason, names in bad.items():
            left = max(0, _NAMED - self.faults[reason])
            self.faults[reason] += len(names)
            for name in names[:left]:
                log.warning("bad sample, %s: %s", reason, name)
            if len(names) >= left > 0:
                log.warning("further samples that are %s are counted only", reason)
