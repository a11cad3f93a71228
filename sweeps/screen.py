"""Output of a sweep in progress: plain lines, or on a terminal one live line a run."""

import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from sweeps.launchers.jobs import Job
from sweeps.progress import Progress, read_progress
from sweeps.time_left import Pace
from switti.durations import duration, short_rate

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# A progress bar of tqdm: it is replaced by a line of ours.
_BAR = re.compile(r"\d+%\||\| *\d+(\.\d+)?k?/\S+ \[")
# Seconds between plain lines on a run at first, and later; age from which it is later.
_OFTEN, _SELDOM, _YOUNG = 30.0, 300.0, 300.0
# Seconds between two drawings.
_LIVE_SECONDS = 1.0
# Of a run's metrics, which are read for each line.
_TAIL_BYTES = 1 << 16
_LOSSES = {"train/loss": "train loss", "validation/loss": "validation loss", "validation/psnr": "PSNR"}


Waiting = Callable[[], list[int]]


class Screen(Protocol):
    """Where a driver shows its progress; text that is printed meanwhile stays intact."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def output(self, job: Job, content: bytes, last: bool) -> None:
        """What a run has printed since the last call; last: it will print nothing more."""

    def show(self, running: Sequence[Job], waiting: Waiting, total: int, pace: Pace) -> None:
        """Called all the time. waiting: gives the steps of each run that has not begun; total: runs of the study."""


class _Lines:
    """The output of runs, line by line; of a line that a bar has rewritten only its last state."""

    def __init__(self) -> None:
        self._rest: dict[str, bytes] = {}

    def split(self, job: Job, content: bytes, last: bool) -> list[str]:
        *lines, rest = (self._rest.pop(job.name, b"") + content).split(b"\n")
        if last and rest:
            lines, rest = [*lines, rest], b""
        # A bar may rewrite its line for hours.
        self._rest[job.name] = rest[rest.rstrip(b"\r").rfind(b"\r") + 1 :]
        return [last_state(line) for line in lines]


def last_state(line: bytes) -> str:
    """What a terminal would show of a line that a progress bar has rewritten with carriage returns."""
    return line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")


class PlainScreen:
    """For files and pipes: the runs' lines, marked if several run at a time, and now and then their progress."""

    def __init__(self, study: str, places: int) -> None:
        self.study, self.places = study, places
        self._lines = _Lines()
        self._begun: dict[str, float] = {}
        self._shown: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdout.flush()

    def output(self, job: Job, content: bytes, last: bool) -> None:
        mark = f"[{job.name}] " if self.places != 1 else ""
        for line in self._lines.split(job, content, last):
            if not _BAR.search(line):
                print(f"{mark}{line.removeprefix(f'{job.folder}: ') if mark else line}", flush=True)

    def show(self, running: Sequence[Job], waiting: Waiting, total: int, pace: Pace) -> None:
        now = time.monotonic()
        due = []
        for job in running:
            begun = self._begun.setdefault(job.name, now)
            interval = _OFTEN if now - begun < _YOUNG else _SELDOM
            if now - self._shown.setdefault(job.name, begun) >= interval:
                due.append(job)
        if not due:
            return
        self._shown |= dict.fromkeys((job.name for job in running), now)
        progress_of = {job.name: read_progress(job.folder, _TAIL_BYTES) for job in running}
        for name, progress in progress_of.items():
            print(f"{name}: {_sentence(progress)}", flush=True)
        if (left := study_left(progress_of, running, waiting(), self.places, pace)) is not None and total > 1:
            print(f"study {self.study}: about {duration(left)} left", flush=True)


def _sentence(progress: Progress) -> str:
    """ "step 120 of 600, 3.2/s, 2 min 30 s left, train loss 5.5123"."""
    if not progress.step:
        return progress.phase or str(progress.state or progress.error)
    parts = [f"step {progress.step} of {progress.steps}"]
    if progress.phase:
        parts.append(progress.phase)
    if progress.rate:
        parts.append(short_rate(progress.rate))
    if progress.left is not None:
        parts.append(f"{duration(progress.left)} left")
    parts += [
        f"{word} {progress.values[name]:.4f}" for name, word in _LOSSES.items() if name in progress.values
    ]
    return ", ".join(parts)


def study_left(
    progress_of: dict[str, Progress], running: Sequence[Job], waiting: Sequence[int], places: int, pace: Pace
) -> float | None:
    """Seconds until all runs are done; None if unknown."""
    going = [(job.steps, progress_of[job.name]) for job in running]
    a_step = pace.seconds_a_step([progress.rate for _, progress in going])
    ends = [
        (max(0, progress.steps - progress.step) if progress.steps else steps, progress.left)
        for steps, progress in going
    ]
    return pace.left(ends, waiting, places, a_step)


class LiveScreen:
    """For a terminal: the runs' lines scroll by above a table with a line for each run in progress."""

    def __init__(self, study: str, places: int, console: "Console | None" = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self.study, self.places = study, places
        self.console = console or Console(highlight=False)
        self._live = Live(console=self.console, auto_refresh=False, transient=True)
        self._lines = _Lines()
        self._begun: dict[str, float] = {}
        self._doing: dict[str, str] = {}
        self._drawn = 0.0
        self._names: set[str] = set()

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def output(self, job: Job, content: bytes, last: bool) -> None:
        from rich.text import Text

        mark = f"[{job.name}] " if self.places != 1 else ""
        for line in self._lines.split(job, content, last):
            # What a run prints of itself while it starts.
            if line.startswith(f"{job.folder}: "):
                self._doing[job.name] = line.removeprefix(f"{job.folder}: ").partition(" ")[0]
            elif line.strip() and not _BAR.search(line):
                self.console.print(Text(mark, style="dim") + Text.from_ansi(line))

    def show(self, running: Sequence[Job], waiting: Waiting, total: int, pace: Pace) -> None:
        now = time.monotonic()
        for job in running:
            self._begun.setdefault(job.name, now)
        names = {job.name for job in running}
        if now - self._drawn < _LIVE_SECONDS and names == self._names:
            return
        self._drawn, self._names = now, names
        self._live.update(self._render(running, waiting(), total, pace, now), refresh=True)

    def _render(
        self, running: Sequence[Job], waiting: Sequence[int], total: int, pace: Pace, now: float
    ) -> "RenderableType":
        from rich.console import Group
        from rich.text import Text

        from sweeps.status_table import runs_table

        progress_of = {job.name: read_progress(job.folder, _TAIL_BYTES) for job in running}
        left = study_left(progress_of, running, waiting, self.places, pace)
        for name, progress in progress_of.items():
            if progress.phase == "starting":
                doing = self._doing.get(name, progress.phase)
                progress_of[name] = replace(progress, phase=f"{doing} {now - self._begun[name]:.0f} s")
        ended = total - len(running) - len(waiting)
        words = [f"{len(running)} running", f"{len(waiting)} to go", f"{max(0, ended)} of {total} done"]
        if left is not None:
            words.append(f"about {duration(left)} left")
        head = Text(f"study {self.study}: {', '.join(words)}", style="bold")
        return Group(
            Text(""), head, *([runs_table(progress_of, self.console.width)[0]] if progress_of else [])
        )


def screen_for(study: str, places: int) -> Screen:
    """The one for where the output goes."""
    return LiveScreen(study, places) if sys.stdout.isatty() else PlainScreen(study, places)
