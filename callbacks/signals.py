"""Deferred signals: a request to stop at the end of the optimizer step instead of an exception in the middle of it."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from switti.errors import EXIT_REQUEUE

PREEMPTING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(SystemExit):
    """The run was stopped by a signal. The process exits with 130 for SIGINT, with EXIT_REQUEUE for the others."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum if signum == signal.SIGINT else EXIT_REQUEUE)
        self.signum = signum


class StopSignals:
    """Handlers that remember the first signal while `deferring` and otherwise act as the ones they replaced.

    noticed: called once, in the main thread, when a signal has been remembered.

    Data-loading processes inherit the handlers when they are forked and ignore what comes: a terminal's Ctrl-C and
    `scancel` reach every process of a job, and a worker that died would take the last step with it. (torch gives its
    workers a SIGTERM handler of its own, which the data module's `outlive_signals` replaces.)
    """

    def __init__(self, noticed: Callable[[], None] | None = None) -> None:
        self.received: int | None = None
        self.deferring = False
        self._noticed = noticed
        self._owner = os.getpid()
        self._previous: dict[int, Any] = {}

    def install(self, number: int) -> None:
        """Take over a signal, again if need be; Python allows it in the main thread only."""
        if threading.current_thread() is threading.main_thread():
            self._previous.setdefault(number, signal.signal(number, self._handle))

    def restore(self) -> None:
        """Restore the previous handlers. If Lightning then restores ours, it acts as the one before it."""
        self.deferring = False
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return
        second = self.received is not None and number == signal.SIGINT
        if self.deferring and not second:
            if self.received is None:
                self.received = number
                if self._noticed is not None:
                    self._noticed()
        elif callable(previous := self._previous.get(number)):
            previous(number, frame)
        else:
            raise Interrupted(number)
