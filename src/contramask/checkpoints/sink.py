"""A file that knows its checksum when it is written, and what went wrong if it is not."""

import hashlib
import os
from io import BufferedIOBase


class Sink:
    """Counts and hashes what passes through to a file.

    torch's zip writer answers an error in the middle of a file with another one ("unexpected pos")
    that hides it; so the first error is kept, the rest swallowed, and `finish` tells what happened.
    """

    def __init__(self, file: BufferedIOBase):
        self.bytes = 0
        self._file = file
        self._hash = hashlib.sha256()
        self._error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Pass on, unless an earlier write failed; returns the number of bytes either way."""
        view = memoryview(data)
        if self._error is None:
            try:
                self._file.write(view)
            except OSError as error:
                self._error = error
            self._hash.update(view)
            self.bytes += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """For torch, which calls it; the file is flushed and synced once, by `finish`."""

    def finish(self) -> str:
        """The SHA-256, once everything is on the disk.

        Raises:
            OSError: the first error of a write, or one of the sync.
        """
        if self._error is not None:
            raise self._error
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._hash.hexdigest()
