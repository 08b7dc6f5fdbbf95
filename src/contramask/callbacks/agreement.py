"""Small vectors that every rank sees alike, without making the host wait for the device.

Reading a number from a GPU stops the host until the GPU has done all that was queued, and then the
GPU idles until the host has queued more. So the rows of update n are gathered on the device, copied
to pinned memory behind the running work, and read after update n + 1 has been queued: by then the
wait is for work that is already done, or nearly, and one whole update is still in the queue. Every
rank reads the same table after the same update, so all of them decide alike.
"""

from typing import NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

from contramask import distributed


class Table(NamedTuple):
    """The rows of all ranks, on the host."""

    step: int  # the update they belong to
    names: tuple[str, ...]  # of the columns
    rows: Shaped[Tensor, "W n"]


class Agreement:
    """Gathers one row of every rank per update. A collective: every rank must call it alike.

    Args:
        delayed: read each table one update late; for rows on a GPU.
    """

    def __init__(self, *, delayed: bool):
        self._delayed = delayed
        self._waiting: tuple[Table, torch.cuda.Event | None] | None = None

    def put(self, row: Shaped[Tensor, " n"], *, step: int, names: tuple[str, ...]) -> Table | None:
        """Hand in this rank's row; returns this update's table or, if delayed, the last one's."""
        rows = distributed.gather(row[None])
        event = None
        if rows.is_cuda:
            rows = rows.to("cpu", non_blocking=True)  # into pinned memory
            event = torch.cuda.Event()
            event.record()
        done = self.flush() if self._delayed else None
        self._waiting = Table(step, names, rows), event
        return done if self._delayed else self.flush()

    def flush(self) -> Table | None:
        """The table that has not been read yet, if there is one; waits for the device."""
        if self._waiting is None:
            return None
        table, event = self._waiting
        self._waiting = None
        if event is not None:
            event.synchronize()
        return table
