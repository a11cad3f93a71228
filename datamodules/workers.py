"""Data workers: starting them, their signal handling, and the error when one dies."""

import atexit
import errno
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from typing import TypeVar
from weakref import WeakSet

from switti.errors import UserError

_WATCH_SECONDS = 1.0
_workers: WeakSet[BaseProcess] = WeakSet()
Iterator = TypeVar("Iterator")


def outlive_signals(_worker: int) -> None:
    """For `worker_init_fn`: ignore what a scheduler or a terminal sends to the whole process group.

    The training process decides when the run stops, after a last step that needs its workers. They end with it, however
    it ends: one that writes into a pipe which nobody reads any more would not notice.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


def started(start: Callable[[], Iterator], workers: int) -> Iterator:
    """The result of `start`, which starts `workers` processes. UserError if the machine does not allow them."""
    before = set(multiprocessing.active_children())
    try:
        if workers:
            _try_out(workers)
        return start()
    except OSError as error:
        raise _cannot_start(error, workers) from error
    finally:
        _workers.update(set(multiprocessing.active_children()) - before)


def _try_out(workers: int) -> None:
    """Allocate what the workers need and release it: torch cannot clean up after a start that fails half-way."""
    pipes: list[int] = []
    queues: list[Queue[None]] = []
    try:
        queues += [multiprocessing.Queue() for _ in range(workers + 1)]
        _ = [multiprocessing.Event() for _ in range(2)]
        for _ in range(workers):
            pipes += os.pipe()
    finally:
        for queue in queues:
            queue.close()
        for descriptor in pipes:
            os.close(descriptor)


@atexit.register
def _end_workers() -> None:
    """Python asks workers with a signal that they ignore, and then waits for them."""
    for worker in list(_workers):
        worker.kill()


def _cannot_start(error: OSError, workers: int) -> UserError:
    """Of the pipes, semaphores and processes that data workers need."""
    remedies = {
        errno.EMFILE: "raise the limit of open files (`ulimit -n 4096`)",
        errno.ENFILE: "the machine has too many open files",
        errno.ENOSPC: "free space in /dev/shm (docker run --shm-size=1g)",
        errno.EAGAIN: "raise the limit of processes (`ulimit -u`)",
        errno.ENOMEM: "the machine has no memory left",
    }
    remedy = remedies.get(error.errno or 0, "free what they need")
    return UserError(
        f"data.workers={workers}: the data workers cannot be started ({error.strerror or error}); {remedy}, or set "
        "data.workers=0"
    )


@contextmanager
def explained_worker_failures() -> Generator[None, None, None]:
    """Replace torch's error about a dead data worker, wherever it is raised, by one that a user can act on."""
    try:
        yield
    except RuntimeError as error:
        if failure := worker_failure(error):
            raise failure from error
        raise


_DEAD = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: (.*?)\. |exited)")


def worker_failure(error: RuntimeError) -> OSError | None:
    """What the user should read when a data worker has died; None for any other error.

    torch notices it wherever the training just is, so that the error may come from elsewhere than the loader.
    """
    found = _DEAD.match(str(error))
    if found is None:
        return None
    how = f"was killed ({found[2]})" if found[2] else "ended unexpectedly"
    likely = ""
    if found[2] in (None, signal.strsignal(signal.SIGKILL)):
        likely = "; most likely the machine ran out of memory: lower data.workers or data.batch_size"
    return OSError(f"data worker {found[1]} {how}{likely}. The same command resumes the run")
