"""python -m experiments.status STUDY [--once] [--every SECONDS]

The runs of a study with their state, step, speed, last metrics and last sign of life, read from the run folders alone.
On a terminal the table is shown again every few seconds until Ctrl-C; elsewhere, or with --once, it is printed once.

    python -m experiments.status demo
    python -m experiments.status runs/demo --once
"""

import argparse
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from experiments.command import run
from switti.errors import UserError
from switti.files import read_json_object
from switti.run_folder import HEARTBEAT, LOG, RECORD, Row, rank_file, read_metrics, read_record
from switti.studies import find_study, heartbeat_age, read_study, state_of

# Of the metrics: enough for the last value of what is logged often, and of most that is not.
_TAIL_BYTES = 1 << 20
_LOSSES = {"train/loss": "train loss", "validation/loss": "validation loss"}
_METRICS = "metrics/"
_RECENT = 20  # logged values over which the speed of a run is taken
_HOME, _CLEAR_LINE, _CLEAR_REST, _CLEAR = "\x1b[H", "\x1b[K", "\x1b[J", "\x1b[2J"


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
    found: dict[str, list[Row]] = {}
    cells: dict[str, list[str]] = {}
    problems = []
    for name in runs:
        try:
            found[name] = read_rows(folder / name)
            cells[name] = [*_progress(folder / name, found[name]), _age(folder / name)]
        except UserError as error:  # a damaged run must not hide the others
            found[name], cells[name] = [], ["unreadable", "–", "–", "–", "–"]
            problems.append(str(error))
    last = {name: {row.metric: row.value for row in rows} for name, rows in found.items()}
    metrics = sorted({metric for values in last.values() for metric in values if metric.startswith(_METRICS)})
    shown = [*_LOSSES, *metrics]
    head = [_LOSSES.get(metric, metric.removeprefix(_METRICS)) for metric in shown]
    lines = [["run", "state", "step", "steps/s", "left", *head, "seen"]]
    for name in runs:
        values = [f"{last[name][metric]:.4f}" if metric in last[name] else "–" for metric in shown]
        *progress, seen = cells[name]
        lines.append([name, *progress, *values, seen])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    ]
    counts = _counts([line[1] for line in lines[1:]])
    return "\n".join([*(line.rstrip() for line in padded), "", counts, *problems])


def planned_runs(folder: Path) -> list[str]:
    """Names of the runs that study.json plans, then of others that have a folder."""
    planned = [entry["name"] for entry in read_study(folder).get("runs") or []]
    started = sorted(path.parent.name for name in (RECORD, LOG) for path in folder.glob(f"*/{name}"))
    return list(dict.fromkeys([*planned, *started]))


def _progress(run_dir: Path, rows: list[Row]) -> list[str]:
    """State, step, speed, time left."""
    record = read_record(run_dir)
    state = str(state_of(run_dir))
    if not record:
        return [state, "–", "–", "–"]
    step, steps = record.get("step", 0), record.get("max_steps", 0)
    step = max([step, *(row.step for row in rows[-1:])]) if state == "running" else step
    speed = (recent_speed(rows, record) if state == "running" else None) or average_speed(record)
    left = (steps - step) / speed if speed and state == "running" else None
    if state == "failed" and record.get("error"):
        state = f"failed: {record['error']}"
    elif state == "running" and (phase := _phase(run_dir)):
        state = f"running: {phase}"
    return [state, f"{step}/{steps}", f"{speed:.2f}" if speed else "–", duration(left)]


def recent_speed(rows: list[Row], record: dict[str, Any]) -> float | None:
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


def _phase(run_dir: Path) -> str | None:
    with suppress(UserError):
        return read_json_object(run_dir / HEARTBEAT / rank_file(0)).get("phase")
    return None


def _age(run_dir: Path) -> str:
    age = heartbeat_age(run_dir)
    return "–" if age is None else f"{duration(age)} ago"


def _counts(states: list[str]) -> str:
    """ "2 finished, 1 running"."""
    plain = [state.partition(":")[0] for state in states]
    return ", ".join(f"{plain.count(state)} {state}" for state in dict.fromkeys(plain))


def read_rows(run_dir: Path) -> list[Row]:
    """The newest rows of a run's metrics."""
    return read_metrics(run_dir, last_bytes=_TAIL_BYTES)


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
