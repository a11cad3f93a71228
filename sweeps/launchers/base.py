"""The driver of a sweep: start the jobs that fit, report those that end, stop cleanly."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Protocol

from sweeps.launchers.jobs import REQUEUE, Job, Outcome, end_of
from sweeps.screen import Screen, last_state
from sweeps.study import StudyRun
from sweeps.time_left import Pace
from switti.errors import UserError
from switti.run_folder import PREEMPTED, PRUNE, read_record

# (the run, what it has printed, whether that was all)
Output = Callable[[Job, bytes, bool], None]
# Python's arguments before those of a run.
TRAIN = ["-m", "experiments.train"]
TAIL_LINES = 12
_TORCHRUN = re.compile(rb"^[EW]\d{4} \S+ \d+ \S*torch/distributed/elastic/", re.MULTILINE)
_POLL_SECONDS = 0.1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Launcher(Protocol):
    """Starts jobs somewhere and reports how they end."""

    def check(self, run: StudyRun) -> None:
        """UserError if the run could never be started."""

    def free_places(self) -> int:
        """How many more jobs may be started now."""

    def fits(self, jobs: list[Job]) -> bool:
        """Whether there is a place for all of these now."""

    def start(self, jobs: list[Job]) -> None:
        """Start them all."""

    def running(self) -> list[Job]:
        """Started and not yet returned by `poll`."""

    def poll(self, output: Output) -> list[Outcome]:
        """Those that have ended since the last call. output: gets what runs on this machine have printed."""

    def stop(self, times: int) -> None:
        """Ask all to stop, for the first, second … time: the more often, the less politely."""


class Source(Protocol):
    """Gives out jobs, whose locks it has taken."""

    def next(self) -> Job | None:
        """Another job, or None if there is none at present; asked again when one has ended."""

    def watch(self, running: list[Job]) -> None:
        """Called all the time."""

    def ended(self, outcome: Outcome) -> str:
        """Called once for each job, still under its lock; a line about it."""

    def waiting(self) -> list[int]:
        """Steps of each run that has not been given out, as far as is known."""

    def total(self) -> int:
        """Runs of the study."""

    def summary(self, outcomes: list[Outcome]) -> str:
        """State of the study after these outcomes, and what the same command again would do."""


class _Stops:
    """How often the user has asked to stop."""

    def __init__(self) -> None:
        self.asked = 0

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1

    @contextmanager
    def counting(self) -> Iterator["_Stops"]:
        """Signals count instead of raising: an exception between two lines would lose a child."""
        before = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def drive(source: Source, launcher: Launcher, screen: Screen) -> tuple[list[Outcome], bool]:
    """Run what `source` gives until it has no more; (how each ended, whether the user stopped it).

    Ctrl-C (or SIGTERM, SIGHUP) asks each run to save and stop, and waits; again: at once; a third time kills.
    A run that was preempted resumes at once, if it got further than the last time.
    """
    outcomes: list[Outcome] = []
    waiting: Job | None = None
    steps: dict[str, int] = {}
    begun: dict[str, float] = {}
    pace = Pace()
    handled = 0
    with _Stops().counting() as stops, screen:
        while True:
            if not stops.asked:
                waiting = _fill(source, launcher, waiting)
            elif stops.asked != handled:
                handled = stops.asked
                _say(f"\nstopping: {_STOPPING[min(handled, 3) - 1]}")
                launcher.stop(handled)
            source.watch(launcher.running())
            begun = {job.name: begun.get(job.name, time.monotonic()) for job in launcher.running()}
            for outcome in launcher.poll(_guarded(screen.output)):
                if not stops.asked and resumes(outcome, steps):
                    _say(f"{outcome.job.name}: preempted; resuming")
                    launcher.start([outcome.job])
                    continue
                outcome = _noted(outcome, time.monotonic() - begun[outcome.job.name])
                try:
                    _say(source.ended(outcome))
                finally:
                    outcome.job.release()
                if outcome.end in ("finished", "pruned"):
                    pace.ended(outcome.job.steps, outcome.seconds)
                outcomes.append(outcome)
            held = [] if waiting is None else [waiting.steps]
            with _outlasting_the_terminal():
                screen.show(launcher.running(), partial(_waiting, held, source), source.total(), pace)
            if not launcher.running() and (stops.asked or waiting is None):
                more = None if stops.asked else source.next()
                if more is None:
                    break
                waiting = more
            time.sleep(_POLL_SECONDS)
    if waiting is not None:
        waiting.release()
    return outcomes, bool(stops.asked)


@contextmanager
def _outlasting_the_terminal() -> Iterator[None]:
    """A terminal that was closed, or a pipe that nobody reads, must not leave the runs without their driver."""
    try:
        yield
    except (OSError, SystemExit):
        # SystemExit: rich's answer to a broken pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())  # type: ignore[union-attr]


def _say(text: str) -> None:
    with _outlasting_the_terminal():
        print(text, flush=True)


def _guarded(output: Output) -> Output:
    def guarded(job: Job, content: bytes, last: bool) -> None:
        with _outlasting_the_terminal():
            output(job, content, last)

    return guarded


def _waiting(held: list[int], source: Source) -> list[int]:
    """Steps of each run that has not begun: one that waits for a free place, and those of the source."""
    return held + source.waiting()


def _noted(outcome: Outcome, seconds: float) -> Outcome:
    return replace(outcome, seconds=seconds, end=end_of(outcome.job, outcome.code))


_STOPPING = (
    "waiting for the runs to save (Ctrl-C again: at once)",
    "at once; what is not saved is lost (Ctrl-C again: kill)",
    "killing the runs",
)


def _fill(source: Source, launcher: Launcher, waiting: Job | None) -> Job | None:
    """Start as many jobs together as fit; return one that has to wait for its place."""
    batch: list[Job] = []
    while len(batch) < launcher.free_places():
        job = waiting or source.next()
        waiting = None
        if job is None:
            break
        if not launcher.fits([*batch, job]):
            waiting = job
            break
        batch.append(job)
    if batch:
        for job in batch:
            _say(f"{job.place}: {job.name} starts")
        launcher.start(batch)
    return waiting


def resumes(outcome: Outcome, steps: dict[str, int]) -> bool:
    """Whether a run that was interrupted from outside should be started again; `steps`: where it was before.

    torchrun turns every exit code into 1, hence the run's marker is looked for as well.
    """
    job = outcome.job
    if outcome.code == 0 or (job.folder / PRUNE).is_file():
        return False
    if outcome.code not in REQUEUE and not (job.folder / PREEMPTED).is_file():
        return False
    try:
        before, now = steps.get(job.name, 0), (read_record(job.folder) or {}).get("step", 0)
    except UserError:
        # The next start reports what is wrong with it.
        return False
    steps[job.name] = now
    return now > before


def torchrun(processes: int, arguments: list[str]) -> list[str]:
    """Command for `arguments` in that many processes on this machine, which get two minutes to save when stopped."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        "--shutdown-timeout=120", *arguments,
    ]  # fmt: skip


def tail_of(content: bytes) -> list[str]:
    """The last lines that are not empty, before torchrun's own report on the end of its children."""
    found = _TORCHRUN.search(content)
    if found and content[: found.start()].strip():
        content = content[: found.start()]
    lines = (last_state(line).strip() for line in content.split(b"\n"))
    return [line for line in lines if line][-TAIL_LINES:]
