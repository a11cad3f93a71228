"""State of a run as its folder shows it, and the runs of a study.

A run that waits in a cluster's queue has a `queued.json`, one that a search has pruned a `prune.json`; who works on a
run holds its lock (`sweeps.run_lock`).
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from sweeps.run_lock import is_claimed
from switti.errors import UserError
from switti.files import read_json_object
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

# Where studies are found by name.
RUNS_DIR = "runs"
# A run on another host that has given no sign of life for this long counts as killed.
_SILENT_SECONDS = 600.0
# Seconds by which two clocks may differ.
_CLOCKS_DIFFER = 5.0
# The last words of a command after Ctrl-C.
_STOPPED = b"error: interrupted\n"
_RESTORE = "restore the file, or remove it: the next sweep writes it again"
# Unix seconds: a sign of life that claims to be later means nothing.
_LATEST = 1e11
# How long an answer of the cluster's queue is believed.
_SQUEUE_SECONDS = 5


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


def find_study(study: str) -> Path:
    """The folder meant by a study's name or path; UserError naming those that exist."""
    for folder in (Path(RUNS_DIR) / study, Path(study)):
        # False for what cannot be the name of a folder, too.
        if os.path.isdir(folder):
            return folder
    known = sorted(path.name for path in Path(RUNS_DIR).glob("*") if path.is_dir())
    raise UserError(not_found("study", study, f"below {RUNS_DIR}/", known))


def state_of(run_dir: str | Path, held: bool = False) -> State:
    """State by the run's files, except that a `running` run whose process is gone is `killed`.

    held: the caller holds the run's lock, so that the lock does not mean that the run is running.
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
    """Of a run that has ended before it wrote a record: failed, or interrupted if a person stopped it."""
    path = folder / LOG
    if not path.is_file():
        return "failed" if (folder / CONFIG).is_file() else "new"
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - len(_STOPPED)))
        return "interrupted" if stream.read() == _STOPPED else "failed"


def state_of_record(record: dict[str, Any] | None) -> State:
    """State by a record's content alone; None is a run that never started."""
    if record is None:
        return "new"
    status: State = record["status"]
    return "killed" if status == "running" and not _is_alive(record) else status


def _is_alive(record: dict[str, Any]) -> bool:
    if record.get("host") != socket.gethostname():
        return "updated" in record and seconds_since(record["updated"]) < _SILENT_SECONDS
    try:
        # Signal 0 only asks whether the process exists.
        os.kill(record["pid"], 0)
    except (KeyError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return not _is_another(record["pid"], record)


def _is_another(pid: int, record: dict[str, Any]) -> bool:
    """Whether a process is a zombie, or younger than the record's last sign of life: after a restart of the machine
    process numbers are reused. Linux only."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        up = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return False
    # Field 22: start in ticks since boot.
    age = up - int(fields[18]) / os.sysconf("SC_CLK_TCK")
    return state in "ZX" or ("updated" in record and age + _CLOCKS_DIFFER < seconds_since(record["updated"]))


def heartbeat_age(run_dir: str | Path) -> float | None:
    """Seconds since the last sign of life of the rank that is silent longest, which may hang. None: no sign."""
    ages = []
    for path in (Path(run_dir) / HEARTBEAT).glob(rank_file("*")):
        # A file of another version is ignored.
        with suppress(UserError, OSError, KeyError, TypeError, ValueError):
            moment = read_json_object(path)["time"]
            if isinstance(moment, str):
                ages.append(seconds_since(moment))
            elif 0 <= moment < _LATEST:
                ages.append(time.time() - moment)
    if not ages and "updated" in (record := read_record(run_dir) or {}):
        ages.append(seconds_since(record["updated"]))
    return max(ages, default=None)


def is_queued(run_dir: str | Path) -> bool:
    """Whether a cluster's queue still has the job that a driver submitted for the run.

    Where the queue cannot be queried the job counts as queued: starting a run twice would be worse.
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
