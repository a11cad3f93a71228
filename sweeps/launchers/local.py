"""Launcher for this machine: some runs at a time, each with its cores and GPUs, torchrun for several ranks."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

from sweeps.launchers.base import TRAIN, Output, tail_of, torchrun
from sweeps.launchers.jobs import Job, Outcome
from sweeps.study import StudyRun
from switti.errors import UserError
from switti.files import check_target, writing
from switti.run_folder import LOG

_TAIL_BYTES = 1 << 16


@dataclass
class _Child:
    job: Job
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    start: int
    slot: int
    gpus: list[str]


class LocalLauncher:
    """`at_a_time` places, which share the cores evenly; a run on GPUs also gets trainer.devices of them for itself.

    Runs write to a file that is followed here, not to a pipe: when this process is killed they continue undisturbed.
    """

    def __init__(self, at_a_time: int) -> None:
        self.at_a_time = at_a_time
        self.cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.gpus = visible_gpus()
        self._children: list[_Child] = []

    def check(self, run: StudyRun) -> None:
        trainer = run.config.trainer
        if trainer.num_nodes > 1:
            raise UserError(
                f"run {run.name}: trainer.num_nodes={trainer.num_nodes} needs --launcher slurm; "
                "--launcher local has this machine alone"
            )
        wanted = trainer.devices if trainer.accelerator == "gpu" else 0
        if self.gpus and trainer.accelerator == "auto":
            wanted = trainer.devices
        if wanted > len(self.gpus):
            raise UserError(
                f"run {run.name}: trainer.devices={trainer.devices} with trainer.accelerator="
                f"{trainer.accelerator} asks for more GPUs than there are ({len(self.gpus)})"
            )

    def free_places(self) -> int:
        return self.at_a_time - len(self._children)

    def fits(self, jobs: list[Job]) -> bool:
        return sum(map(self._gpus_for, jobs)) <= len(self._free_gpus())

    def running(self) -> list[Job]:
        return [child.job for child in self._children]

    def start(self, jobs: list[Job]) -> None:
        for job in jobs:
            self._children.append(self._start(job))

    def _start(self, job: Job) -> _Child:
        slot = min(set(range(self.at_a_time)) - {child.slot for child in self._children})
        gpus = self._free_gpus()[: self._gpus_for(job)]
        arguments = [*TRAIN, *job.arguments]
        command = torchrun(job.devices, arguments) if job.ranks > 1 else [sys.executable, *arguments]
        job.folder.mkdir(parents=True, exist_ok=True)
        path = job.folder / LOG
        with writing(check_target(path)), path.open("ab") as output:
            output.write(
                f"--- {datetime.now().astimezone():%Y-%m-%d %H:%M:%S%z} {shlex.join(command)}\n".encode()
            )
            output.flush()
            start = output.tell()
            process = subprocess.Popen(
                command,
                env=self._environment(job, gpus),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # A session of its own: the terminal's Ctrl-C must reach a run once, from `stop`, not twice.
                start_new_session=True,
                pass_fds=(job.lock,),
            )
        if share := self._share(slot):
            # It may have ended already.
            with suppress(OSError):
                os.sched_setaffinity(process.pid, share)
        log = path.open("rb")
        log.seek(start)
        return _Child(job, process, log, start, slot, gpus)

    def _share(self, slot: int) -> list[int]:
        """The cores of a place; none where there are fewer cores than places, which then share all."""
        each = len(self.cores) // self.at_a_time
        return self.cores[slot * each : (slot + 1) * each] if self.at_a_time > 1 else []

    def _environment(self, job: Job, gpus: list[str]) -> dict[str, str]:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        if self.at_a_time * job.devices > 1:
            cores = (len(self.cores) or os.cpu_count() or 1) // (self.at_a_time * job.devices)
            environment.setdefault("OMP_NUM_THREADS", str(max(1, cores)))
        return environment

    def _gpus_for(self, job: Job) -> int:
        return job.devices if self.gpus and job.accelerator != "cpu" else 0

    def _free_gpus(self) -> list[str]:
        taken = {gpu for child in self._children for gpu in child.gpus}
        return [gpu for gpu in self.gpus if gpu not in taken]

    def poll(self, output: Output) -> list[Outcome]:
        ended = []
        for child in list(self._children):
            code = child.process.poll()
            output(child.job, child.log.read(), code is not None)
            if code is None:
                continue
            # What it left behind, such as data-loading processes.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.process.pid, signal.SIGKILL)
            ended.append(Outcome(child.job, code, _tail(child)))
            child.log.close()
            self._children.remove(child)
        return ended

    def stop(self, times: int) -> None:
        """SIGINT to the leader, which passes it to its ranks and data-loading processes; the third time kills all."""
        for child in self._children:
            if times < 3:
                with suppress(ProcessLookupError):
                    child.process.send_signal(signal.SIGINT)
                continue
            for pid in [*descendants(child.process.pid), child.process.pid]:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)


def _tail(child: _Child) -> list[str]:
    end = child.log.seek(0, os.SEEK_END)
    child.log.seek(max(child.start, end - _TAIL_BYTES))
    return tail_of(child.log.read())


def visible_gpus() -> list[str]:
    """Numbers (or names) of the GPUs that may be used: CUDA_VISIBLE_DEVICES, or all that the driver lists."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [text.strip() for text in chosen.split(",") if text.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    count = sum(line.startswith("GPU ") for line in done.stdout.splitlines())
    return [str(number) for number in range(count)]


def descendants(pid: int) -> Iterator[int]:
    """All processes below one, deepest first. Linux only."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in path.read_text().split():
                yield from descendants(int(child))
                yield int(child)
