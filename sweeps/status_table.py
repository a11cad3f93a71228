"""Table of the runs of a study, as wide as the terminal: state, step, speed, time left, values, last sign of life."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sweeps.launchers.jobs import count
from sweeps.progress import Progress, read_progress
from sweeps.run_state import read_study
from switti.durations import short_duration, short_rate
from switti.escape import printable
from switti.run_folder import LOG, RECORD

_METRICS = "metrics/"
# Of one of several validation splits.
_SPLIT = re.compile(r"validation/([a-z][a-z0-9_]*)/(loss|psnr)")
# Of values in the order of their importance: the first ones stay where there is little space.
_VALUES = {
    "train/loss": "train loss",
    "validation/loss": "valid. loss",
    "validation/psnr": "PSNR, dB",
    "validation/lpips": "LPIPS",
    "validation/ssim": "SSIM",
    "validation/codebook_use": "codebook use",
}
_COLORS = {"running": "cyan", "finished": "green", "failed": "red", "killed": "red", "unreadable": "red"}
_STATES: dict[str | None, str] = {"new": "not started"}
# Values that come before speed and times where there is little space.
_FIRST = 2
# Characters between two columns.
_GAP = 2
# Characters of a run's name, which is folded if it is longer.
_NARROWEST = 16


def screen(folder: Path, width: int) -> RenderableType:
    """The table in `width` columns, with the names of what does not fit below it."""
    runs = {name: read_progress(folder / name) for name in listed_runs(folder)}
    if not runs:
        return Text(f"no run in {folder} has started")
    table, hidden = runs_table(runs, width)
    lines = [
        Text(""),
        Text(count([_state(progress) for progress in runs.values()])),
    ]
    for name, progress in runs.items():
        if progress.error:
            lines.append(
                Text(f"{printable(name)}: {progress.error}" if progress.state else progress.error, "red")
            )
        if progress.early_stop:
            lines.append(
                Text(f"{printable(name)}: stopped early at step {progress.step}: {progress.early_stop}")
            )
    if hidden:
        lines.append(Text(f"not shown in {width} columns: {', '.join(hidden)}", style="dim"))
    return Group(table, *lines)


def runs_table(runs: dict[str, Progress], width: int) -> tuple[Table, list[str]]:
    """(a line for each run, heads of the columns that do not fit)."""
    shown, hidden = _fitting(runs, width)
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold", show_edge=False)
    table.add_column("run", overflow="fold")
    for column in shown:
        table.add_column(column.head, justify=column.justify, no_wrap=True)
    space = width - sum(column.width(runs.values()) + _GAP for column in shown)
    for name, progress in runs.items():
        table.add_row(
            Text(folded(printable(name), max(1, space))), *(column.cell(progress) for column in shown)
        )
    return table, hidden


def listed_runs(folder: Path) -> list[str]:
    """Names of the runs in study.json, then of others that have a folder."""
    listed = [entry["name"] for entry in read_study(folder).get("runs") or []]
    started = sorted(path.parent.name for name in (RECORD, LOG) for path in folder.glob(f"*/{name}"))
    return list(dict.fromkeys([*listed, *started]))


@dataclass(frozen=True)
class _Column:
    head: str
    text: Callable[[Progress], str]
    right: bool = True

    @property
    def justify(self) -> Literal["left", "right"]:
        return "right" if self.right else "left"

    def cell(self, progress: Progress) -> Text:
        text = self.text(progress)
        return Text(text, style=_COLORS.get(_state(progress), "") if self.head == "state" else "")

    def width(self, runs: Iterable[Progress]) -> int:
        return max([len(self.head), *(len(self.text(progress)) for progress in runs)])


def _fitting(runs: dict[str, Progress], width: int) -> tuple[list[_Column], list[str]]:
    """(columns beside the name, heads of those that do not fit)."""
    values = {metric for progress in runs.values() for metric in progress.values}
    measured = sorted(metric for metric in values if metric.startswith(_METRICS))
    splits = sorted(metric for metric in values if _SPLIT.fullmatch(metric))
    metrics = [metric for metric in (*_VALUES, *splits, *measured) if metric in values]
    state = _Column("state", _state_and_phase, right=False)
    step = _Column("step", lambda progress: f"{progress.step}/{progress.steps}" if progress.steps else "–")
    rate = _Column("rate", lambda progress: short_rate(progress.rate))
    left = _Column("left", lambda progress: short_duration(progress.left))
    seen = _Column("seen", lambda progress: short_duration(progress.seen))
    measured_columns = [_Column(_VALUES.get(name) or _head(name), _value(name)) for name in metrics]
    space = width - min(max(map(len, runs)), max(_NARROWEST, width * 2 // 5))
    chosen = []
    for column in [state, step, *measured_columns[:_FIRST], left, rate, seen, *measured_columns[_FIRST:]]:
        if (needed := column.width(runs.values()) + _GAP) <= space:
            chosen.append(column)
            space -= needed
    columns = [state, step, rate, left, *measured_columns, seen]
    hidden = [column.head for column in columns if column not in chosen]
    return [column for column in columns if column in chosen], hidden


def _head(metric: str) -> str:
    if match := _SPLIT.fullmatch(metric):
        return f"{_VALUES[f'validation/{match[2]}']}, {match[1]}"
    return printable(metric.removeprefix(_METRICS))


def _value(metric: str) -> Callable[[Progress], str]:
    return lambda progress: f"{progress.values[metric]:.4f}" if metric in progress.values else "–"


def _state(progress: Progress) -> str:
    return _STATES.get(progress.state, progress.state or "unreadable")


def _state_and_phase(progress: Progress) -> str:
    return progress.phase or _state(progress)


def folded(name: str, width: int) -> str:
    """A run's name on lines of `width` characters, broken behind its commas where that is possible."""
    lines = [""]
    for part in name.replace(",", ",\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
