"""A map over worker processes that keeps the order, holds few results at a time, and notices when a worker dies."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from switti.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
_CHUNK = 4
_CHUNKS_A_WORKER = 4


def ordered_map(function: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[R]:
    """`function` of each item, in order; in this process if `workers` is 1 or less, otherwise in `workers` processes.

    Raises:
        UserError: the processes cannot be started, or one of them was killed.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    try:
        pool = ProcessPoolExecutor(workers, initializer=_begin)
    except OSError as error:
        raise _cannot_start(workers, error) from error
    waiting: deque[Future[list[R]]] = deque()
    try:
        for start in range(0, len(items), _CHUNK):
            try:
                waiting.append(pool.submit(_apply, function, items[start : start + _CHUNK]))
            except OSError as error:
                raise _cannot_start(workers, error) from error
            if len(waiting) >= workers * _CHUNKS_A_WORKER:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, most likely because the memory ran out; nothing was written. Use fewer "
            f"--workers than {workers}, or a smaller --max-pixels"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _apply(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    return [function(item) for item in items]


def _cannot_start(workers: int, error: OSError) -> UserError:
    return UserError(f"cannot start {workers} worker processes: {error.strerror}; --workers 1 needs none")


def _begin() -> None:
    """In a worker: interrupts are the parent's business, and without the parent there is nothing to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
