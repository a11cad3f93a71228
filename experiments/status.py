"""python -m experiments.status STUDY [--watch]

The runs of a study with their state, step, speed and last losses, read from the run folders alone.

    python -m experiments.status demo
    python -m experiments.status runs/demo --watch
"""

import argparse
import csv
import os
import time
from pathlib import Path
from typing import Any

from experiments.command import run
from switti.errors import UserError
from switti.files import read_json
from switti.studies import run_folders, seconds_since, state_of_record

_TAIL_BYTES = 1 << 16  # of metrics.csv: enough for the last value of every curve that is logged often
_SHOWN = {"train/loss": "train loss", "validation/loss": "validation loss"}
_REFRESH_SECONDS = 5.0
_HEAD = ("run", "state", "step", "steps/s", "left", *_SHOWN.values(), "seen")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", help="a name below runs/, or a folder of run folders")
    parser.add_argument("--watch", action="store_true", help=f"show it again every {_REFRESH_SECONDS:g} s")
    options = parser.parse_args(arguments)
    folder = _folder(options.study)
    while True:
        text = table(folder)
        print(("\x1b[2J\x1b[H" if options.watch else "") + text, flush=True)
        if not options.watch:
            return 0
        time.sleep(_REFRESH_SECONDS)


def _folder(study: str) -> Path:
    for folder in (Path("runs") / study, Path(study)):
        if folder.is_dir():
            return folder
    known = sorted(path.name for path in Path("runs").glob("*") if path.is_dir())
    raise UserError(f"no study {study!r} below runs/; there are: {', '.join(known) or 'none'}")


def table(folder: Path) -> str:
    """One line a run; columns are padded to their widest cell."""
    rows = [_HEAD, *(_row(run_dir) for run_dir in run_folders(folder))]
    if len(rows) == 1:
        return f"no run in {folder} has started"
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _row(run_dir: Path) -> tuple[str, ...]:
    record: dict[str, Any] = read_json(run_dir / "record.json")
    state = state_of_record(record)
    step, steps, seconds = record["step"], record["max_steps"], record["train_seconds"]
    speed = step / seconds if seconds and step else None
    left = (steps - step) / speed if speed and state == "running" else None
    last = last_values(run_dir / "metrics.csv")
    losses = (f"{last[name]:.4f}" if name in last else "–" for name in _SHOWN)
    shown = f"{state}: {record['error']}" if state == "failed" and record.get("error") else state
    return (
        run_dir.name,
        shown,
        f"{step}/{steps}",
        f"{speed:.2f}" if speed else "–",
        _duration(left),
        *losses,
        f"{_duration(seconds_since(record['updated']))} ago",
    )


def last_values(path: Path) -> dict[str, float]:
    """The newest value of each metric in the last part of a metrics.csv; empty if there is no such file yet."""
    if not path.is_file():
        return {}
    with path.open("rb") as stream:
        stream.seek(max(0, os.path.getsize(path) - _TAIL_BYTES))
        lines = stream.read().decode(errors="replace").splitlines()
    rows = (row for row in csv.reader(lines) if len(row) == 5 and row[0].isdigit())
    return {metric: float(value) for _step, _epoch, metric, value, _time in rows}


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    )


if __name__ == "__main__":
    run(main)
