"""Progress of a run, read from its folder alone: step, speed, time left, phase, last values."""

import math
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sweeps.run_state import State, heartbeat_age, state_of
from switti.durations import duration
from switti.errors import UserError
from switti.escape import printable
from switti.files import read_json_object
from switti.run_folder import HEARTBEAT, Row, rank_file, read_metrics, read_record

# Of the metrics: enough for the last value of what is logged often, and of most that is not.
_TAIL_BYTES = 1 << 20
# Logged values over which the speed of a run is taken.
_RECENT = 20
# Characters of a phase.
_LONGEST = 20
# Seconds in one phase from which they are shown.
_STANDSTILL = 60.0
_WORDS = {"validation": "validating", "checkpoint": "saving", "ending": "ending"}


@dataclass(frozen=True)
class Progress:
    """One run. phase: what a running one is doing, if that is not training steps. rate: steps a second, of late if the
    run is running, else of its whole training. left, seen: seconds to its end, and since its last sign of life.

    values: metric → last value. error: why it failed, or why its folder cannot be read. early_stop: why a finished one
    has ended before its last step.
    """

    state: State | None
    step: int = 0
    steps: int = 0
    phase: str = ""
    rate: float | None = None
    left: float | None = None
    seen: float | None = None
    values: dict[str, float] = field(default_factory=dict)
    error: str = ""
    early_stop: str = ""


def read_progress(run_dir: Path, last_bytes: int = _TAIL_BYTES) -> Progress:
    """Progress now; a folder that cannot be read has no state, and an error. last_bytes: of the metrics."""
    try:
        return _read(run_dir, last_bytes)
    except (UserError, OSError) as error:
        # A corrupt run must not hide the others.
        return Progress(None, error=printable(str(error)))


def _read(run_dir: Path, last_bytes: int) -> Progress:
    record, state = read_record(run_dir) or {}, state_of(run_dir)
    rows = read_metrics(run_dir, last_bytes)
    step, steps = record.get("step", 0), record.get("max_steps", 0)
    values = {row.metric: row.value for row in rows}
    phase, rate, left = "", average_speed(record), None
    if state == "running":
        heartbeat = _heartbeat(run_dir)
        # Not of an attempt before this one, which has noted its end.
        begun = (heartbeat.get("status", "running") if heartbeat else record.get("status")) == "running"
        step = max([step, _count(heartbeat.get("step")) if begun else 0, *(row.step for row in rows[-1:])])
        rate = recent_speed(rows, record) if begun else None
        left = (steps - step) / rate if rate and steps >= step else None
        phase = _phase(heartbeat, step) if begun else "ending" if _is_alive(heartbeat) else "starting"
    error = record.get("error") or "" if state == "failed" else ""
    early = record.get("early_stop", {}).get("reason", "") if state == "finished" else ""
    seen = heartbeat_age(run_dir)
    return Progress(state, step, steps, phase, rate, left, seen, values, printable(error), printable(early))


def _heartbeat(run_dir: Path) -> dict[str, Any]:
    with suppress(UserError, OSError):
        return read_json_object(run_dir / HEARTBEAT / rank_file(0))
    return {}


def _is_alive(heartbeat: dict[str, Any]) -> bool:
    """Whether the process that has noted its end still exists."""
    pid = _count(heartbeat.get("pid"))
    if not 0 < pid < 1 << 31 or heartbeat.get("host") != socket.gethostname():
        return False
    with suppress(ProcessLookupError, PermissionError):
        # Signal 0 only asks whether the process exists.
        os.kill(pid, 0)
        return True
    return False


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _phase(heartbeat: dict[str, Any], step: int) -> str:
    """The phase if it is not training steps, else "". Files are some seconds old: the metrics may be newer."""
    phase, since = str(heartbeat.get("phase", "")), heartbeat.get("since")
    stands = time.time() - since if isinstance(since, int | float) and math.isfinite(since) else 0.0
    if phase == "starting":
        return "" if step > _count(heartbeat.get("step")) else "starting"
    if stands > _STANDSTILL:
        return f"{_WORDS.get(phase, printable(phase)[:_LONGEST])} for {duration(stands)}"
    return _WORDS.get(phase, "")


def read_rows(run_dir: Path) -> list[Row]:
    """The newest rows of a run's metrics."""
    return read_metrics(run_dir, last_bytes=_TAIL_BYTES)


def recent_speed(rows: Sequence[Row], record: dict[str, Any]) -> float | None:
    """Steps a second over the last logged values; before a run was resumed they say nothing."""
    begun = max(record.get("resumed", []), default=0)
    points = [(row.step, row.time) for row in rows if row.metric == "train/loss" and row.step > begun]
    if len(points) < 2:
        return None
    (first, start), (last, end) = points[-_RECENT:][0], points[-1]
    return (last - first) / (end - start) if end > start and last > first else None


def average_speed(record: dict[str, Any]) -> float | None:
    """Steps a second of the whole training."""
    seconds, step = record.get("train_seconds"), record.get("step")
    return step / seconds if seconds and step else None
