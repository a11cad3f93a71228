"""SIGINT and SIGTERM as a wish to stop at the next good moment, instead of an exception in the middle of a step."""

import os
import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(SystemExit):
    """The run was stopped by a signal after it had saved its state. The process exits with 128 + the signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


class StopSignals:
    """Handlers that remember the first signal while `deferring` and otherwise act as the ones they replaced.

    Data-loading processes inherit them when they are forked and ignore SIGINT: a terminal's Ctrl-C goes to the whole
    process group, and a worker that died would take the last step with it. (torch gives its workers a SIGTERM handler
    of its own, so SIGTERM should be sent to the training process alone, as the sweep and torchrun do.)
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.deferring = False
        self._owner = os.getpid()
        self._previous: dict[int, Any] = {}

    def install(self, number: int) -> None:
        """Take over a signal, again if need be; elsewhere than in the main thread Python does not allow it."""
        if threading.current_thread() is threading.main_thread():
            self._previous.setdefault(number, signal.signal(number, self._handle))

    def restore(self) -> None:
        """Give the signals back. Lightning may put a handler back that it found: it then acts as the one before."""
        self.deferring = False
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return
        second = self.received is not None and number == signal.SIGINT
        if self.deferring and not second:
            self.received = number
        elif callable(previous := self._previous.get(number)):
            previous(number, frame)
        else:
            raise Interrupted(number)
