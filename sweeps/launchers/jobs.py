"""Jobs of a sweep: a run to be started, and its outcome."""

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sweeps.progress import read_progress
from sweeps.run_state import state_of
from sweeps.study import StudyRun
from switti.durations import duration
from switti.errors import EXIT_HUNG, EXIT_INTERRUPTED, EXIT_REQUEUE, UserError
from switti.run_folder import read_record

# Exit codes of a run that is worth another start.
REQUEUE = (EXIT_REQUEUE, EXIT_HUNG)
End = Literal["finished", "pruned", "interrupted", "failed"]
# Metrics of the line about a finished run, which shows the first two that it has.
_SHOWN = {
    "validation/loss": "validation loss",
    "validation/psnr": "PSNR",
    "validation/lpips": "LPIPS",
    "train/loss": "train loss",
}


@dataclass(frozen=True)
class Job:
    """A run to be started. lock: descriptor of its lock, which whoever works on the run keeps open.

    place: such as "run 2 of 4". steps: optimizer steps that it still has to take.
    """

    name: str
    arguments: list[str]
    folder: Path
    nodes: int
    devices: int
    accelerator: str
    lock: int
    place: str = ""
    steps: int = 0

    @property
    def ranks(self) -> int:
        return self.nodes * self.devices

    def release(self) -> None:
        """Give the lock back, as far as this process has it."""
        os.close(self.lock)


@dataclass(frozen=True)
class Outcome:
    """How a job ended. tail: its last lines. end and seconds: noted by the driver, while it holds the run's lock."""

    job: Job
    code: int
    tail: list[str]
    end: End = "finished"
    seconds: float = 0.0


def job_of(run: StudyRun, lock: int, place: str = "") -> Job:
    """`lock` as from `sweeps.run_lock.claim`."""
    settings = run.config.trainer
    return Job(
        run.name,
        run.arguments,
        run.config.run_dir,
        settings.num_nodes,
        settings.devices,
        settings.accelerator,
        lock,
        place,
        steps_left(run),
    )


def steps_left(run: StudyRun) -> int:
    """Optimizer steps that a run has not taken yet."""
    taken = 0
    # Whoever starts it reports what is wrong.
    with suppress(UserError):
        taken = (read_record(run.config.run_dir) or {}).get("step", 0)
    return max(0, run.config.trainer.max_steps - taken)


def end_of(job: Job, code: int) -> End:
    """The kind of an end, while the run's lock is held."""
    with suppress(UserError):
        state = state_of(job.folder, held=True)
        if state == "pruned":
            return "pruned"
        # torchrun turns the exit codes of runs that have saved themselves into 1.
        if code and job.ranks > 1 and state == "interrupted":
            return "interrupted"
    if code == 0:
        return "finished"
    return "interrupted" if job.ranks == 1 and code in (EXIT_INTERRUPTED, *REQUEUE) else "failed"


def why(outcome: Outcome) -> str:
    """The error in a line: from the record, or what a command says last when a user is to blame."""
    with suppress(UserError):
        if error := (read_record(outcome.job.folder) or {}).get("error"):
            return str(error)
    said = [line.removeprefix("error: ") for line in outcome.tail if line.startswith("error: ")]
    if said:
        return said[-1]
    if outcome.code < 0:
        with suppress(ValueError):
            name = signal.Signals(-outcome.code).name
            return f"killed by {name}" + ("; memory may have run out" if name == "SIGKILL" else "")
    return f"exit code {outcome.code}"


def describe(outcome: Outcome) -> str:
    """A line about a run that has ended."""
    job = outcome.job
    head = f"{job.place}: {job.name}".removeprefix(": ")
    progress = read_progress(job.folder)
    if outcome.end == "failed":
        return f"{head} failed: {why(outcome)}"
    if outcome.end != "finished":
        return f"{head} was {outcome.end} at step {progress.step}"
    values = [
        f"{word} {progress.values[name]:.4f}" for name, word in _SHOWN.items() if name in progress.values
    ]
    return ", ".join([f"{head} finished: {progress.step} steps, {duration(outcome.seconds)}", *values[:2]])


def count(words: Sequence[str]) -> str:
    """ "2 finished, 1 failed": how often each word occurs, in order of first occurrence."""
    return ", ".join(f"{list(words).count(word)} {word}" for word in dict.fromkeys(words))
