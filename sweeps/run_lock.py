"""Locks of runs and studies: who may start a run, and who may write into its folder.

A run has two locks, because its driver and its training may be on different machines, and because a run can be started
without a driver:

- A driver (a sweep) claims `<study>/.locks/<run>`, before the run's folder exists. Its child inherits the descriptor:
  the run counts as running from its start until the last of its processes has ended, even without its driver.
- Whoever trains holds `<run>/.lock`, so that two commands cannot write into one folder: neither two trainings, nor a
  driver's child beside a training that a person has started, here or on another machine.

`claim` checks both. All are flock(2) locks, which the system releases however a process ends.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from switti.errors import UserError
from switti.files import check_target, writing

# Driver's locks, in the study's folder; beside those of the runs the study's own.
_CLAIMS = ".locks"
_STUDY = ".study"
# The training's lock, in the run's folder.
_TRAINING = ".lock"
# A reader of the state holds a lock for an instant.
_ATTEMPTS, _PAUSE = 5, 0.02

_not_for_children: set[int] = set()


def claim(run_dir: str | Path) -> int | None:
    """Take the driver's lock of a run.

    Returns:
        An inheritable file descriptor that holds the lock until it and its copies are closed; None if another driver
        has it or the run is being trained.
    """
    path = _claim_path(Path(run_dir))
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    if _lock_patiently(descriptor) and not _is_locked(Path(run_dir) / _TRAINING):
        return descriptor
    os.close(descriptor)
    return None


@contextmanager
def training_lock(run_dir: str | Path) -> Iterator[None]:
    """Keep other trainings from the run's folder until the end of the block or of this process, however it ends.

    A launcher that is killed leaves its ranks running: the same command again must not write between them. Raises
    UserError if another process trains the run.
    """
    path = Path(run_dir) / _TRAINING
    with writing(check_target(path)):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _lock_patiently(descriptor):
            raise UserError(f"{run_dir} is being trained by another process; end that first")
        # Of this process alone: data-loading processes close it at once, and so cannot outlive it with the lock.
        _not_for_children.add(descriptor)
        yield
    finally:
        _not_for_children.discard(descriptor)
        os.close(descriptor)


@contextmanager
def study_lock(study: str | Path) -> Iterator[None]:
    """One process at a time inside, for each study folder."""
    while (lock := claim(Path(study) / _STUDY)) is None:
        time.sleep(_PAUSE)
    try:
        yield
    finally:
        os.close(lock)


def is_claimed(run_dir: str | Path) -> bool:
    """Whether some process works on the run: a driver, or a training."""
    return _is_locked(_claim_path(Path(run_dir))) or _is_locked(Path(run_dir) / _TRAINING)


def _claim_path(run_dir: Path) -> Path:
    return run_dir.parent / _CLAIMS / run_dir.name


def _close_in_child() -> None:
    for descriptor in _not_for_children:
        os.close(descriptor)
    _not_for_children.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        # What cannot be opened cannot have been locked.
        return False
    try:
        return not _try_lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _lock_patiently(descriptor: int) -> bool:
    for attempt in range(_ATTEMPTS):
        if _try_lock(descriptor, fcntl.LOCK_EX):
            return True
        if attempt + 1 < _ATTEMPTS:
            time.sleep(_PAUSE)
    return False


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # A file system without locks.
        return True
    return True
