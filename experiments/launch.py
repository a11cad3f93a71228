"""Child processes for runs: some at a time, their output passed on, stopped cleanly on Ctrl-C. Not a command itself."""

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import IO, cast

TAIL_LINES = 12
_output = threading.Lock()


@dataclass(frozen=True)
class Outcome:
    """How a child ended. tail: its last lines."""

    name: str
    code: int
    tail: list[str]


class Children:
    """The processes that are running now; knows how to tell all of them to stop."""

    def __init__(self) -> None:
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        self._stopped = False

    def run(
        self, name: str, command: Sequence[str], environment: dict[str, str], prefix: str
    ) -> Outcome | None:
        """Run one child to its end; None if the whole was stopped before it began."""
        with self._lock:
            if self._stopped:
                return None
            # A session of its own: the terminal's Ctrl-C must reach a child once, from `stop`, not twice.
            child = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._running[name] = child
        tail = _pass_on(cast(IO[bytes], child.stdout), prefix)
        code = child.wait()
        with self._lock:
            del self._running[name]
        return Outcome(name, code, tail)

    def stop(self, number: int) -> None:
        """Start nothing more and send a signal to every running child."""
        with self._lock:
            self._stopped = True
            for child in self._running.values():
                if child.poll() is None:
                    child.send_signal(number)


def _pass_on(stream: IO[bytes], prefix: str) -> list[str]:
    """Copy a child's output to ours as it comes and return its last lines; `prefix` needs whole lines."""
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    rest = b""
    while chunk := os.read(stream.fileno(), 1 << 16):
        if not prefix:
            _write(chunk)
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            _keep(tail, line)
            if prefix:
                _write(f"{prefix}{_last_state(line)}\n".encode())
    if rest:
        _keep(tail, rest)
        _write(f"{prefix}{_last_state(rest)}\n".encode() if prefix else b"\n")
    return list(tail)


def _last_state(line: bytes) -> str:
    """What a terminal would show of a line that a progress bar has rewritten with carriage returns."""
    return line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")


def _keep(tail: deque[str], line: bytes) -> None:
    if text := _last_state(line).strip():
        tail.append(text)


def _write(content: bytes) -> None:
    with _output:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()


def launch_all(jobs: Sequence[tuple[str, Sequence[str]]], at_a_time: int) -> list[Outcome]:
    """Run (name, command) pairs, `at_a_time` of them together, and return how each ended, in the given order.

    Together they share the cores: each gets its part as OMP_NUM_THREADS, unless that is set already. Ctrl-C sends
    SIGINT to each child and waits until all have saved; a second one is passed on too. KeyboardInterrupt follows.
    """
    together = min(at_a_time, len(jobs))
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if together > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // together)))
    children = Children()
    with ThreadPoolExecutor(max(1, together)) as pool:
        futures = [
            pool.submit(children.run, name, command, environment, f"[{name}] " if together > 1 else "")
            for name, command in jobs
        ]
        if _wait(futures, children):
            raise KeyboardInterrupt
        return [outcome for future in futures if (outcome := future.result()) is not None]


def _wait(futures: list[Future[Outcome | None]], children: Children) -> bool:
    """Wait for all; True if Ctrl-C came in between."""
    interrupted = False
    pending = set(futures)
    while pending:
        try:
            pending = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED).not_done
        except KeyboardInterrupt:
            interrupted = True
            _write(b"\nstopping: waiting for the runs to save (Ctrl-C again: at once)\n")
            children.stop(signal.SIGINT)
    return interrupted
