"""Launcher for SLURM, through submitit: job arrays, nodes and tasks from the runs' settings.

Each task of a job (srun starts them) is one rank and starts `experiments.train` in a process of its own. Ahead of a
time limit SLURM sends SIGUSR2: the run saves, and submitit queues the job again.
"""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from sweeps.launchers.base import TRAIN, Output, tail_of
from sweeps.launchers.jobs import Job, Outcome
from sweeps.study import StudyRun
from switti.errors import UserError
from switti.files import write_json
from switti.run_folder import LOG, QUEUED

try:
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError
except ImportError as error:
    raise UserError(
        "--launcher slurm needs submitit: pip install 'submitit>=1.5.4,<2' (or -e '.[sweep]')"
    ) from error

_TIME = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+)(?::(\d+))?")
# Before the time limit, in which a run saves.
_SAVE_SECONDS = 180
# Times that a job may reach its time limit.
_REQUEUES = 100
# Between two queries of sacct about jobs that have left no result.
_ASK_SECONDS = 30.0
_PORTS = range(20000, 60000)


@dataclass(frozen=True)
class Resources:
    """Resources that sbatch requests besides nodes and tasks. more: other options of sbatch by name."""

    minutes: int
    partition: str | None = None
    cpus: int | None = None
    memory: int | None = None
    more: dict[str, str] = field(default_factory=dict)


def resources(options: argparse.Namespace) -> Resources:
    """From the command line; UserError for what cannot be read."""
    more = {}
    for item in options.sbatch:
        key, equals, value = item.partition("=")
        if not key or not equals:
            raise UserError(f"--sbatch {item}: options of sbatch are key=value, such as account=me")
        more[key.lstrip("-")] = value
    return Resources(minutes(options.time), options.partition, options.cpus, options.memory, more)


def minutes(text: str) -> int:
    """SLURM's ways to write a time: minutes, minutes:seconds, hours:minutes:seconds, days-hours…"""
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        raise UserError(f"--time {text} is not [days-]hours:minutes:seconds or minutes")
    numbers = [int(part) for part in parts]
    if dash:
        seconds = sum(n * unit for n, unit in zip(numbers, (3600, 60, 1), strict=False)) + int(days) * 86400
    elif len(numbers) == 3:
        seconds = numbers[0] * 3600 + numbers[1] * 60 + numbers[2]
    else:
        seconds = numbers[0] * 60 + (numbers[1] if len(numbers) == 2 else 0)
    if seconds < 60:
        raise UserError(f"--time {text} is less than a minute")
    return seconds // 60


class Rank:
    """A task of a job; pickled by submitit, which calls it and, when SLURM preempts the node, `checkpoint`."""

    def __init__(self, command: Sequence[str], folder: str, ranks: int) -> None:
        self.command, self.folder, self.ranks = list(command), folder, ranks
        self._child: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Exit code of the run's process."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        job = submitit.JobEnvironment()
        if self.ranks > 1:
            environment |= _rendezvous(job)
        name = LOG if job.global_rank == 0 else f"output.rank_{job.global_rank}.log"
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        signal.signal(signal.SIGTERM, self._forward)
        # Of this task before the job was requeued.
        job.paths.result_pickle.unlink(missing_ok=True)
        with open(Path(self.folder) / name, "ab") as output:
            moment = datetime.now().astimezone()
            output.write(
                f"--- {moment:%Y-%m-%d %H:%M:%S%z} job {job.job_id} on {socket.gethostname()}\n".encode()
            )
            output.flush()
            self._child = subprocess.Popen(
                self.command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=_ignore_until_ready,
            )
            return self._child.wait()

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Let the run save itself; returns what starts when the job is requeued."""
        if self._child is not None:
            with suppress(ProcessLookupError):
                self._child.send_signal(signal.SIGTERM)
            # Not `wait`: this runs in a signal handler, which has interrupted the `wait` of __call__ with its lock.
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(Rank(self.command, self.folder, self.ranks))


def _ignore_until_ready() -> None:
    """SLURM signals every process of a job; one that is still importing must not die of it."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _rendezvous(job: "submitit.JobEnvironment") -> dict[str, str]:
    """The environment that torchrun would set for torch.distributed."""
    each = job.num_tasks // job.num_nodes
    # The same in all tasks, mostly free.
    port = _PORTS[sum(map(ord, job.job_id)) * 7919 % len(_PORTS)]
    return {
        "TORCHELASTIC_RUN_ID": job.job_id,
        "MASTER_ADDR": "127.0.0.1" if job.num_nodes == 1 else job.hostnames[0],
        "MASTER_PORT": str(port),
        "RANK": str(job.global_rank),
        "WORLD_SIZE": str(job.num_tasks),
        "LOCAL_RANK": str(job.local_rank),
        "LOCAL_WORLD_SIZE": str(each),
        "GROUP_RANK": str(job.node),
    }


class SlurmLauncher:
    """Submits everything at once as job arrays of runs with the same shape, `at_a_time` of which run together.

    search: its trials come one after another, as jobs of their own. detach: submit and do not wait.
    """

    def __init__(
        self,
        folder: Path,
        wanted: Resources,
        at_a_time: int | None,
        *,
        search: bool = False,
        detach: bool = False,
    ) -> None:
        self.folder, self.wanted, self.at_a_time = folder, wanted, at_a_time
        self.search, self.detach = search, detach
        self._jobs: dict[str, tuple[Job, submitit.Job[Any]]] = {}
        self._asked = time.monotonic()
        self._executor()

    def _executor(self) -> "submitit.AutoExecutor":
        try:
            folder = self.folder / ".slurm" / "%j"
            return submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=_REQUEUES)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"--launcher slurm: {error}; start it where sbatch and srun are") from error

    def check(self, run: StudyRun) -> None:
        """No-op: only sbatch knows the cluster's resources."""

    def free_places(self) -> int:
        return (self.at_a_time or 1) - len(self._jobs) if self.search else sys.maxsize

    def fits(self, jobs: list[Job]) -> bool:
        return True

    def running(self) -> list[Job]:
        return [job for job, _ in self._jobs.values()]

    def start(self, jobs: list[Job]) -> None:
        shapes = defaultdict(list)
        for job in jobs:
            shapes[job.nodes, job.devices, job.accelerator != "cpu"].append(job)
        for (nodes, devices, gpus), members in shapes.items():
            executor = self._executor()
            try:
                executor.update_parameters(**self._parameters(nodes, devices, gpus))
                submitted = self._submit(executor, members)
            except (FailedSubmissionError, subprocess.CalledProcessError, FailedJobError) as error:
                reason = " ".join(str(error).split())
                raise UserError(f"sbatch refuses the study's jobs: {reason}") from error
            for job, handle in zip(members, submitted, strict=True):
                moment = datetime.now(UTC).isoformat(timespec="seconds")
                write_json(
                    job.folder / QUEUED, {"launcher": "slurm", "job": handle.job_id, "submitted": moment}
                )
                print(f"{job.name}: job {handle.job_id}", flush=True)
                if self.detach:
                    job.release()
                else:
                    self._jobs[job.name] = (job, handle)

    def _submit(self, executor: "submitit.AutoExecutor", jobs: list[Job]) -> list["submitit.Job[Any]"]:
        ranks = [Rank([sys.executable, *TRAIN, *job.arguments], str(job.folder), job.ranks) for job in jobs]
        if len(ranks) == 1:
            return [executor.submit(ranks[0])]
        with executor.batch():
            submitted = [executor.submit(rank) for rank in ranks]
        return submitted

    def _parameters(self, nodes: int, devices: int, gpus: bool) -> dict[str, Any]:
        wanted = self.wanted
        parameters: dict[str, Any] = {
            "name": self.folder.name,
            "nodes": nodes,
            "tasks_per_node": devices,
            "timeout_min": wanted.minutes,
            "slurm_signal_delay_s": _SAVE_SECONDS,
            "slurm_additional_parameters": wanted.more,
            "stderr_to_stdout": True,
        }
        optional = {
            "gpus_per_node": devices if gpus else None,
            "cpus_per_task": wanted.cpus,
            "mem_gb": wanted.memory,
            "slurm_partition": wanted.partition,
            "slurm_array_parallelism": self.at_a_time,
        }
        return parameters | {name: value for name, value in optional.items() if value is not None}

    def poll(self, output: Output) -> list[Outcome]:
        ask = time.monotonic() - self._asked > _ASK_SECONDS
        if ask:
            self._asked = time.monotonic()
        ended = []
        for job, handle in list(self._jobs.values()):
            if handle.done(force_check=ask):
                del self._jobs[job.name]
                (job.folder / QUEUED).unlink(missing_ok=True)
                ended.append(_outcome(job, handle))
        return ended

    def stop(self, times: int) -> None:
        """`scancel`: SLURM sends SIGTERM, on which runs save, and kills what is left after the cluster's KillWait."""
        for _job, handle in self._jobs.values():
            handle.cancel(check=False)


def submit_array(
    folder: Path, wanted: Resources, command: Sequence[str], environments: Sequence[dict[str, str]], gpus: int
) -> list[str]:
    """Submit independent processes of one command, each with its environment, as a job array; their job ids.

    Their output is in folder/workers/0000/output.log, … Preempted or out of time, they are queued again.
    """
    launcher = SlurmLauncher(folder, wanted, None)
    executor = launcher._executor()
    ranks = [
        Rank(
            ["env", *(f"{name}={value}" for name, value in environment.items()), *command],
            str(folder / "workers" / f"{number:04d}"),
            1,
        )
        for number, environment in enumerate(environments)
    ]
    try:
        executor.update_parameters(
            **launcher._parameters(1, 1, gpus > 0) | ({"gpus_per_node": gpus} if gpus else {})
        )
        with executor.batch():
            handles = [executor.submit(rank) for rank in ranks]
    except (FailedSubmissionError, subprocess.CalledProcessError, FailedJobError) as error:
        raise UserError(f"sbatch refuses the jobs: {' '.join(str(error).split())}") from error
    return [handle.job_id for handle in handles]


def _outcome(job: Job, handle: "submitit.Job[Any]") -> Outcome:
    try:
        codes = handle.results()
    except (UncompletedJobError, FailedJobError) as error:
        return Outcome(job, 1, tail_of(str(error).encode()))
    log = job.folder / LOG
    tail = tail_of(log.read_bytes()[-(1 << 16) :]) if log.is_file() else []
    return Outcome(job, next((code for code in codes if code), 0), tail)
