"""python -m experiments.status STUDY [--once] [--every SECONDS]

The runs of a study with their state, step, speed, last metrics and last sign of life, read from the run folders alone.
On a terminal the table is shown again every few seconds until Ctrl-C; elsewhere, or with --once, it is printed once.

    python -m experiments.status demo
    python -m experiments.status runs/demo --once
"""

import argparse
import csv
import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from experiments.command import run
from switti.errors import UserError
from switti.files import read_json
from switti.studies import find_study, heartbeat_age, state_of

_TAIL_BYTES = (
    1 << 20
)  # of metrics.csv: enough for the last value of what is logged often, and of most that is not
_LOSSES = {"train/loss": "train loss", "validation/loss": "validation loss"}
_METRICS = "metrics/"
_RECENT = 20  # logged values over which the speed of a run is taken
_HOME, _CLEAR_LINE, _CLEAR_REST, _CLEAR = "\x1b[H", "\x1b[K", "\x1b[J", "\x1b[2J"

Rows = list[tuple[int, str, float, float]]  # step, metric, value, Unix time


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.status",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", help="a name below runs/, or a folder of run folders")
    parser.add_argument("--once", action="store_true", help="print it once, also on a terminal")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="(default %(default)s)")
    options = parser.parse_args(arguments)
    if options.every <= 0:
        raise UserError(f"--every {options.every:g} must be positive")
    folder = find_study(options.study)
    if options.once or not sys.stdout.isatty():
        print(table(folder))
        return 0
    _live(folder, options.every)
    return 0


def _live(folder: Path, every: float) -> None:
    """Redraws in place, cut to the terminal, until Ctrl-C, which is the way to leave and no error."""
    print(_CLEAR, end="")
    with suppress(KeyboardInterrupt):
        while True:
            size = shutil.get_terminal_size()
            lines = [*table(folder).splitlines(), "", f"{time.strftime('%H:%M:%S')}  Ctrl-C leaves"]
            shown = "\n".join(line[: size.columns] + _CLEAR_LINE for line in lines[: size.lines - 1])
            print(_HOME + shown + "\n" + _CLEAR_REST, end="", flush=True)
            time.sleep(every)


def table(folder: Path) -> str:
    """One line a run; columns are padded to their widest cell."""
    runs = planned_runs(folder)
    if not runs:
        return f"no run in {folder} has started"
    found = {name: read_rows(folder / name / "metrics.csv") for name in runs}
    last = {name: {metric: value for _, metric, value, _ in rows} for name, rows in found.items()}
    metrics = sorted({metric for values in last.values() for metric in values if metric.startswith(_METRICS)})
    shown = [*_LOSSES, *metrics]
    head = [_LOSSES.get(metric, metric.removeprefix(_METRICS)) for metric in shown]
    lines = [["run", "state", "step", "steps/s", "left", *head, "seen"]]
    for name in runs:
        try:
            cells, seen = _progress(folder / name, found[name]), _age(folder / name)
        except UserError:  # a damaged record must not hide the other runs
            cells, seen = ["unreadable", "–", "–", "–"], "–"
        values = [f"{last[name][metric]:.4f}" if metric in last[name] else "–" for metric in shown]
        lines.append([name, *cells, *values, seen])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    ]
    return "\n".join([*(line.rstrip() for line in padded), "", _counts([line[1] for line in lines[1:]])])


def planned_runs(folder: Path) -> list[str]:
    """Names of the runs that study.json plans, then of others that have a folder."""
    planned = [entry["name"] for entry in read_json(folder / "study.json", default={}).get("runs", [])]
    started = sorted(
        path.parent.name for name in ("record.json", "output.log") for path in folder.glob(f"*/{name}")
    )
    return list(dict.fromkeys([*planned, *started]))


def _progress(run_dir: Path, rows: Rows) -> list[str]:
    """State, step, speed, time left."""
    record: dict[str, Any] = read_json(run_dir / "record.json", default={})
    state = str(state_of(run_dir))
    if not record:
        return [state, "–", "–", "–"]
    step, steps = record["step"], record["max_steps"]
    step = max([step, *(row[0] for row in rows[-1:])]) if state == "running" else step
    speed = (recent_speed(rows, record) if state == "running" else None) or average_speed(record)
    left = (steps - step) / speed if speed and state == "running" else None
    if state == "failed" and record.get("error"):
        state = f"failed: {record['error']}"
    elif state == "running" and (phase := _phase(run_dir)):
        state = f"running: {phase}"
    return [state, f"{step}/{steps}", f"{speed:.2f}" if speed else "–", duration(left)]


def recent_speed(rows: Rows, record: dict[str, Any]) -> float | None:
    """Steps a second over the last logged values; before a run was resumed they say nothing."""
    begun = max(record.get("resumed", []), default=0)
    points = [(step, moment) for step, metric, _, moment in rows if metric == "train/loss" and step > begun]
    if len(points) < 2:
        return None
    (first, start), (last, end) = points[-_RECENT:][0], points[-1]
    return (last - first) / (end - start) if end > start and last > first else None


def average_speed(record: dict[str, Any]) -> float | None:
    """Steps a second of the whole training."""
    seconds = record.get("train_seconds")
    return record["step"] / seconds if seconds and record["step"] else None


def _phase(run_dir: Path) -> str | None:
    with suppress(UserError, AttributeError):
        return (read_json(run_dir / "heartbeat" / "rank_0.json") or {}).get("phase")
    return None


def _age(run_dir: Path) -> str:
    age = heartbeat_age(run_dir)
    return "–" if age is None else f"{duration(age)} ago"


def _counts(states: list[str]) -> str:
    """ "2 finished, 1 running"."""
    plain = [state.partition(":")[0] for state in states]
    return ", ".join(f"{plain.count(state)} {state}" for state in dict.fromkeys(plain))


def read_rows(path: Path) -> Rows:
    """The last part of a metrics.csv; empty if there is no such file yet."""
    if not path.is_file():
        return []
    with path.open("rb") as stream:
        stream.seek(max(0, os.path.getsize(path) - _TAIL_BYTES))
        text = stream.read().decode(errors="replace")
    lines = text[: text.rfind("\n") + 1].splitlines()  # the last one may be being written
    rows = (row for row in csv.reader(lines) if len(row) == 5 and row[0].isdigit())
    return [(int(step), metric, float(value), float(moment)) for step, _epoch, metric, value, moment in rows]


def duration(seconds: float | None) -> str:
    """ "1 h 02 min", "3 min 04 s" or "5 s"."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    )


if __name__ == "__main__":
    run(main)
