"""Run folders seen from outside: which runs a study has, what state each is really in, and who may work on one.

A run is locked by who works on it, in two places. A driver (a sweep) holds `<study>/.locks/<run>`, and its child holds
it, too: a run counts as running from the moment in which it is started until the last of its processes has gone, even
without its driver. Whoever trains holds `<run>/.lock`, so that two commands cannot write into one folder: neither two
trainings, nor a driver's child beside one that a person has started, here or from another machine. `claim` looks at
both.
A run that waits in a cluster's queue has a `queued.json`; one that a search has given up a `prune.json`.
"""

import fcntl
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from switti.errors import UserError
from switti.files import check_target, read_json_object, writing
from switti.run_folder import (
    CONFIG,
    HEARTBEAT,
    LOG,
    PRUNE,
    QUEUED,
    RECORD,
    STUDY,
    rank_file,
    read_record,
    seconds_since,
)
from switti.suggestions import not_found

State = Literal["new", "queued", "running", "finished", "failed", "interrupted", "killed", "pruned"]

_SILENT_SECONDS = 600.0  # a run on another host that has given no sign of life for this long counts as killed
_CLOCKS_DIFFER = 5.0  # seconds between two ways to tell the time
_LOCKS = ".locks"  # in the study's folder
_LOCK = ".lock"  # in the run's folder
_STOPPED = b"error: interrupted\n"  # the last words of a command after Ctrl-C
_ALL = ".study"  # beside the locks of the runs
_CLAIM_ATTEMPTS, _CLAIM_PAUSE = 5, 0.02  # a reader of the state holds the lock for an instant
_RESTORE = "restore the file, or remove it: the next sweep writes it again"
_LATEST = 1e11  # Unix seconds in a sign of life that can be meant
_SQUEUE_SECONDS = 5  # how long an answer of the cluster's queue is believed


def run_folders(study: str | Path) -> Iterator[Path]:
    """The runs of a study folder, runs/<study>, in the order of their names."""
    yield from sorted(path.parent for path in Path(study).glob(f"*/{RECORD}"))


def read_study(study: str | Path) -> dict[str, Any]:
    """study.json, which a sweep writes, checked as far as its parts are used; {} if the study has none."""
    path = Path(study) / STUDY
    content = read_json_object(path)
    for key, kind in (("vary", dict), ("points", dict), ("search", dict), ("runs", list)):
        if not isinstance(content.get(key) or kind(), kind):
            raise UserError(
                f"{path}: {key} must be {kind.__name__}, not {str(content[key])[:60]!r}; {_RESTORE}"
            )
    for run in content.get("runs") or []:
        if not isinstance(run, dict) or not isinstance(run.get("name"), str):
            raise UserError(f"{path}: each of runs must have a name, unlike {str(run)[:60]!r}; {_RESTORE}")
    return content


def find_study(study: str, runs_dir: str | Path = "runs") -> Path:
    """The folder meant by a study's name or path; UserError naming those that exist."""
    for folder in (Path(runs_dir) / study, Path(study)):
        if os.path.isdir(folder):  # false for what cannot be the name of a folder, too
            return folder
    known = sorted(path.name for path in Path(runs_dir).glob("*") if path.is_dir())
    raise UserError(not_found("study", study, f"below {runs_dir}/", known))


def state_of(run_dir: str | Path, held: bool = False) -> State:
    """What the run's files say, except that a `running` run whose process is gone is `killed`.

    held: the caller holds the run's lock, so that it says nothing.
    """
    folder = Path(run_dir)
    state = state_of_record(read_record(folder))
    if state in ("finished", "running"):
        return state
    if is_queued(folder):
        return "queued"
    if not held and is_claimed(folder):
        return "running"
    if state == "new":
        return _state_without_record(folder)
    return "pruned" if (folder / PRUNE).is_file() else state


def _state_without_record(folder: Path) -> State:
    """Of a run that has ended before it wrote a record: it failed, unless a person stopped it."""
    path = folder / LOG
    if not path.is_file():
        return "failed" if (folder / CONFIG).is_file() else "new"
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - len(_STOPPED)))
        return "interrupted" if stream.read() == _STOPPED else "failed"


def state_of_record(record: dict[str, Any] | None) -> State:
    """The same for a record's content alone; None is a run that never started."""
    if record is None:
        return "new"
    status: State = record["status"]
    return "killed" if status == "running" and not _is_alive(record) else status


def _is_alive(record: dict[str, Any]) -> bool:
    if record.get("host") != socket.gethostname():
        return "updated" in record and seconds_since(record["updated"]) < _SILENT_SECONDS
    try:
        os.kill(record["pid"], 0)  # signal 0 asks only whether the process is there
    except (KeyError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return not _is_another(record["pid"], record)


def _is_another(pid: int, record: dict[str, Any]) -> bool:
    """Whether a process is dead and only not yet buried, or younger than the record's last sign of life: after a
    restart of the machine numbers are given out anew. Linux alone tells."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        up = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return False
    age = up - int(fields[18]) / os.sysconf("SC_CLK_TCK")  # field 22, start in ticks since boot
    return state in "ZX" or ("updated" in record and age + _CLOCKS_DIFFER < seconds_since(record["updated"]))


def heartbeat_age(run_dir: str | Path) -> float | None:
    """Seconds since the most silent rank's sign of life: one that hangs is what one wants to see. None: no sign."""
    ages = []
    for path in (Path(run_dir) / HEARTBEAT).glob(rank_file("*")):
        with suppress(
            UserError, OSError, KeyError, TypeError, ValueError
        ):  # a file of another version says nothing
            moment = read_json_object(path)["time"]
            if isinstance(moment, str):
                ages.append(seconds_since(moment))
            elif 0 <= moment < _LATEST:
                ages.append(time.time() - moment)
    if not ages and "updated" in (record := read_record(run_dir) or {}):
        ages.append(seconds_since(record["updated"]))
    return max(ages, default=None)


def _lock_path(run_dir: Path) -> Path:
    return run_dir.parent / _LOCKS / run_dir.name


@contextmanager
def training_lock(run_dir: str | Path) -> Iterator[None]:
    """Keep other trainings from the run's folder until the end of the block or of this process, however it ends.

    A launcher that is killed leaves its ranks running: the same command again must not write between them. Raises
    UserError if another process trains the run.
    """
    path = Path(run_dir) / _LOCK
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


_not_for_children: set[int] = set()


def _close_in_child() -> None:
    for descriptor in _not_for_children:
        os.close(descriptor)
    _not_for_children.clear()


os.register_at_fork(after_in_child=_close_in_child)


def claim(run_dir: str | Path) -> int | None:
    """An inheritable file descriptor that holds the run's lock until it and its copies are closed; None if taken."""
    path = _lock_path(Path(run_dir))
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    if _lock_patiently(descriptor) and not _is_locked(Path(run_dir) / _LOCK):
        return descriptor
    os.close(descriptor)
    return None


@contextmanager
def alone(study: str | Path) -> Iterator[None]:
    """One process at a time inside, for each study folder."""
    while (lock := claim(Path(study) / _ALL)) is None:
        time.sleep(_CLAIM_PAUSE)
    try:
        yield
    finally:
        os.close(lock)


def is_claimed(run_dir: str | Path) -> bool:
    """Whether some process works on the run: a driver, or a training."""
    return _is_locked(_lock_path(Path(run_dir))) or _is_locked(Path(run_dir) / _LOCK)


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:  # nobody can have locked what cannot be opened
        return False
    try:
        return not _try_lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _lock_patiently(descriptor: int) -> bool:
    """A reader of the state holds the lock for an instant, which is no reason to give way."""
    for attempt in range(_CLAIM_ATTEMPTS):
        if _try_lock(descriptor, fcntl.LOCK_EX):
            return True
        if attempt + 1 < _CLAIM_ATTEMPTS:
            time.sleep(_CLAIM_PAUSE)
    return False


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def is_queued(run_dir: str | Path) -> bool:
    """Whether a cluster's queue still has the job that a driver submitted for the run.

    Where the queue cannot be asked the job counts as queued: to start a run twice would be worse.
    """
    job = read_json_object(Path(run_dir) / QUEUED).get("job")
    if job is None:
        return False
    jobs = _queue(int(time.monotonic() / _SQUEUE_SECONDS))
    return jobs is None or str(job) in jobs


@lru_cache(maxsize=1)
def _queue(moment: int) -> frozenset[str] | None:
    """Ids of the user's jobs, array tasks as 12_3; `moment` changes when it is time to ask again. None: no answer."""
    if shutil.which("squeue") is None:
        return None
    try:
        done = subprocess.run(
            ["squeue", "--me", "--noheader", "--array", "--format=%i"],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return frozenset(done.stdout.split())
