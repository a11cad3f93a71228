"""How a launcher is driven: start what fits, pass on what ends, stop cleanly. No command itself."""

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from callbacks.stopping import EXIT_HUNG, EXIT_REQUEUE
from configs.study import PlannedRun
from switti.errors import UserError
from switti.run_folder import PREEMPTED, PRUNE, read_record

TRAIN = ["-m", "experiments.train"]  # what Python is given, before a run's arguments
REQUEUE = (EXIT_REQUEUE, EXIT_HUNG)  # ends of a run that is worth another start
TAIL_LINES = 12
_TORCHRUN = re.compile(rb"^[EW]\d{4} \S+ \d+ \S*torch/distributed/elastic/", re.MULTILINE)
_POLL_SECONDS = 0.1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Job:
    """A run to be started. lock: descriptor of its lock, which whoever works on the run keeps open."""

    name: str
    arguments: list[str]
    folder: Path
    nodes: int
    devices: int
    accelerator: str
    lock: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.devices

    def release(self) -> None:
        """Give the lock back, as far as this process has it."""
        os.close(self.lock)


@dataclass(frozen=True)
class Outcome:
    """How a job ended. tail: its last lines."""

    job: Job
    code: int
    tail: list[str]


def job_of(planned: PlannedRun, lock: int) -> Job:
    """`lock` as from `switti.studies.claim`."""
    settings = planned.config.trainer
    return Job(
        planned.name,
        planned.arguments,
        planned.config.run_dir,
        settings.num_nodes,
        settings.devices,
        settings.accelerator,
        lock,
    )


class Launcher(Protocol):
    """Starts jobs somewhere and tells how they end."""

    def check(self, planned: PlannedRun) -> None:
        """UserError if the run could never be started."""

    def room(self) -> int:
        """How many more jobs may be started now."""

    def fits(self, jobs: list[Job]) -> bool:
        """Whether there is a place for all of these now."""

    def start(self, jobs: list[Job]) -> None:
        """Start them all."""

    def running(self) -> list[Job]:
        """Started and not yet returned by `poll`."""

    def poll(self) -> list[Outcome]:
        """Those that have ended since the last call."""

    def stop(self, times: int) -> None:
        """Ask all to stop, for the first, second … time: the more often, the less politely."""


class Source(Protocol):
    """Gives out jobs, whose locks it has taken."""

    def next(self) -> Job | None:
        """Another job, or None if there is none at present; asked again when one has ended."""

    def watch(self, running: list[Job]) -> None:
        """Called all the time."""

    def ended(self, outcome: Outcome) -> None:
        """Called once for each job, still under its lock."""


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


def drive(source: Source, launcher: Launcher) -> tuple[list[Outcome], bool]:
    """Run what `source` gives until it has no more; (how each ended, whether the user stopped it).

    Ctrl-C (or SIGTERM, SIGHUP) asks each run to save and stop, and waits; again: at once; a third time kills.
    A run that was interrupted by its machine goes on at once, if it got further than the last time.
    """
    outcomes: list[Outcome] = []
    waiting: Job | None = None
    steps: dict[str, int] = {}
    told = 0
    with _Stops().counting() as stops:
        while True:
            if not stops.asked:
                waiting = _fill(source, launcher, waiting)
            elif stops.asked != told:
                told = stops.asked
                print(f"\nstopping: {_STOPPING[min(told, 3) - 1]}", flush=True)
                launcher.stop(told)
            source.watch(launcher.running())
            for outcome in launcher.poll():
                if not stops.asked and goes_on(outcome, steps):
                    print(f"{outcome.job.name}: interrupted by its machine; it goes on", flush=True)
                    launcher.start([outcome.job])
                    continue
                try:
                    source.ended(outcome)
                finally:
                    outcome.job.release()
                outcomes.append(outcome)
            if not launcher.running() and (stops.asked or waiting is None):
                more = None if stops.asked else source.next()
                if more is None:
                    break
                waiting = more
            time.sleep(_POLL_SECONDS)
    if waiting is not None:
        waiting.release()
    return outcomes, bool(stops.asked)


_STOPPING = (
    "waiting for the runs to save (Ctrl-C again: at once)",
    "at once; what is not saved is lost (Ctrl-C again: kill)",
    "killing the runs",
)


def _fill(source: Source, launcher: Launcher, waiting: Job | None) -> Job | None:
    """Start what there is room for, together; return a job that has to wait for its place."""
    batch: list[Job] = []
    while len(batch) < launcher.room():
        job = waiting or source.next()
        waiting = None
        if job is None:
            break
        if not launcher.fits([*batch, job]):
            waiting = job
            break
        batch.append(job)
    if batch:
        launcher.start(batch)
    return waiting


def goes_on(outcome: Outcome, steps: dict[str, int]) -> bool:
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
    except UserError:  # the next start says what is wrong with it
        return False
    steps[job.name] = now
    return now > before


def torchrun(processes: int, arguments: list[str]) -> list[str]:
    """Python with `arguments` in so many processes on this machine; they get two minutes to save when it is stopped."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        "--shutdown-timeout=120", *arguments,
    ]  # fmt: skip


def last_state(line: bytes) -> str:
    """What a terminal would show of a line that a progress bar has rewritten with carriage returns."""
    return line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")


def tail_of(content: bytes) -> list[str]:
    """The last lines that say something, ahead of what torchrun has to say about the end of its children."""
    found = _TORCHRUN.search(content)
    if found and content[: found.start()].strip():
        content = content[: found.start()]
    lines = (last_state(line).strip() for line in content.split(b"\n"))
    return [line for line in lines if line][-TAIL_LINES:]
