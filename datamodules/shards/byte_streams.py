"""Bytes that come from somewhere else: the output of a command (`pipe:…`) or an HTTP answer, as a file read forward.

Whatever goes wrong is an OSError with the reason: a command that fails, an answer that ends early, no byte for
`timeout` seconds.
"""

import os
import select
import signal
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

CHUNK = 1 << 16


class Readable(Protocol):
    """All that tarfile needs of a stream."""

    def read(self, size: int, /) -> bytes: ...


@contextmanager
def opened(url: str, timeout: float) -> Iterator[Readable]:
    """The bytes behind `pipe:<shell command>` or an http(s) address."""
    if url.startswith("pipe:"):
        with _command(url.removeprefix("pipe:"), timeout) as stream:
            yield stream
    else:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            length = answer.headers.get("Content-Length")
            yield _Answer(answer, int(length) if length else None)


class _Answer:
    """An HTTP answer that says when it ended early; http.client would call that its end."""

    def __init__(self, answer: Readable, length: int | None) -> None:
        self.answer, self.length, self.seen = answer, length, 0

    def read(self, size: int) -> bytes:
        data = self.answer.read(size)
        self.seen += len(data)
        if size and not data and self.length is not None and self.seen < self.length:
            raise OSError(f"ended after {self.seen} of {self.length} bytes")
        return data


@contextmanager
def _command(command: str, timeout: float) -> Iterator[Readable]:
    """In a process group of its own, so that a pipeline of several programs can be ended as a whole."""
    process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, start_new_session=True)
    try:
        yield _Output(process, timeout)
    finally:
        _end(process)
        process.wait()
        assert process.stdout is not None  # it was asked for
        process.stdout.close()


class _Output:
    def __init__(self, process: subprocess.Popen[bytes], timeout: float) -> None:
        self.process, self.timeout = process, timeout

    def read(self, size: int) -> bytes:
        assert self.process.stdout is not None  # it was asked for
        descriptor = self.process.stdout.fileno()
        ready = select.poll()  # not select.select, which knows the first 1024 descriptors only
        ready.register(descriptor, select.POLLIN)
        if not ready.poll(self.timeout * 1000):
            raise OSError(f"no byte for {self.timeout:g} s")
        data = os.read(descriptor, min(size, CHUNK))
        if not data and (code := self._code()):
            raise OSError(f"the command ended with code {code}")
        return data

    def _code(self) -> int:
        """How the command has ended. One that has closed its output and does not end is ended."""
        late = threading.Timer(self.timeout, _end, [self.process])
        late.start()
        try:
            return self.process.wait()
        finally:
            late.cancel()


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
