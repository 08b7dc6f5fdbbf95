"""Signals as notes: a handler writes down what came and does nothing else.

A handler runs between any two lines of the program: inside a save, inside a collective, while a
lock is held. Saving or talking to other ranks from there tears files and hangs jobs. So what a
signal asks for is done later, between two updates, by `contramask.callbacks.preemption`.

This file imports neither torch nor Lightning: the command line calls `inbox.watch()` before it
imports them, because SLURM may warn a job during the half minute its imports and set-up take, and
the default action of SIGUSR1 is death.
"""

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

STOP = (signal.SIGUSR1, signal.SIGTERM)

Handler = Callable[[int, FrameType | None], Any] | int | None


class Inbox:
    """The signals that came to this process; `received` is the greatest, 0 if there is none.

    SIGTERM (15) beats SIGUSR1 (10) beats SIGINT (2), so the maximum over ranks is well defined.
    """

    def __init__(self):
        self.received = 0
        self._previous: dict[int, Handler] = {}

    def watch(self, *signals: int) -> None:
        """Write down these signals, by default SIGUSR1 and SIGTERM, from now on.

        Python lets only the main thread set handlers; elsewhere this does nothing but say so.
        """
        if threading.current_thread() is not threading.main_thread():
            log.warning("not in the main thread: signals to stop are not heeded")
            return
        for number in signals or STOP:
            previous = signal.signal(number, self._note)
            if previous != self._note:
                self._previous.setdefault(number, previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            # The second Ctrl-C of somebody who does not want to wait for the end of the update.
            raise KeyboardInterrupt
        self.received = max(self.received, number)

    def deafen(self) -> None:
        """Ignore the watched signals, so that nothing but SIGKILL interrupts what follows.

        What came is forgotten with it: it has been answered, should this process train again.
        """
        self.received = 0
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        """Give the handlers back to those who had them, and forget what came."""
        for number, handler in self._previous.items():
            # None: the handler was set outside Python and cannot be set again from inside.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}
        self.received = 0


inbox = Inbox()  # one for the process, as signal handlers are
