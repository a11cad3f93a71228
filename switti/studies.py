"""Run folders seen from outside: which runs a study has, and what state each is really in."""

import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from switti.files import read_json

State = Literal["new", "running", "finished", "failed", "interrupted", "killed"]

_SILENT_SECONDS = 600.0  # a run on another host that has given no sign of life for this long counts as killed


def run_folders(study: str | Path) -> Iterator[Path]:
    """The runs of a study folder, runs/<study>, in the order of their names."""
    yield from sorted(path.parent for path in Path(study).glob("*/record.json"))


def state_of(run_dir: str | Path) -> State:
    """What record.json says, except that a `running` run whose process is gone is `killed`."""
    return state_of_record(read_json(Path(run_dir) / "record.json"))


def state_of_record(record: dict[str, Any] | None) -> State:
    """The same for a record's content; None is a run that never started."""
    if record is None:
        return "new"
    status: State = record["status"]
    return "killed" if status == "running" and not _is_alive(record) else status


def _is_alive(record: dict[str, Any]) -> bool:
    if record.get("host") != socket.gethostname():
        return seconds_since(record["updated"]) < _SILENT_SECONDS
    try:
        os.kill(record["pid"], 0)  # signal 0 asks only whether the process is there
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def seconds_since(moment: str) -> float:
    """Seconds from an ISO time with zone, as in record.json, to now."""
    return (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()
