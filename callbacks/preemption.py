"""Preemption: on a scheduler's or a user's signal finish the step, save, leave a marker, end with a meaningful code.

SIGTERM, SIGUSR1 and SIGUSR2 mean that the machine is being reclaimed: exit code 75, upon which a scheduler restarts
the same command. torchrun turns every worker's code into 1; its caller reads `preempted.json` in the run folder
instead, which exists if and only if the last attempt was stopped in this way. SIGINT is a person who wants the run to
end: exit code 130, no marker.

Under SLURM, rank zero requeues the job after SIGUSR1 or SIGUSR2 (`#SBATCH --signal=USR2@180`). After SIGTERM it does
not: SLURM itself requeues preempted jobs, and `scancel` must stay a cancellation.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from callbacks.base import OptimizerStepCallback
from callbacks.checkpointing import RunCheckpoint
from callbacks.signals import PREEMPTING, Interrupted, StopSignals
from switti.distributed.collectives import all_reduce_max
from switti.errors import EXIT_REQUEUE, UserError
from switti.files import write_json
from switti.run_folder import PREEMPTED

REQUEUING = (signal.SIGUSR1, signal.SIGUSR2)


class Preemption(OptimizerStepCallback):
    """A signal to any rank: all ranks finish the optimizer step, save, run a validation that is due, and end.

    Place it after all callbacks that change state at the end of a batch. A second SIGINT stops at once.

    grace_seconds: between the signal and the end. What is not done by then (a validation, or the step itself) is cut
    off; the run resumes from the last checkpoint. requeue: call `scontrol requeue` as described above. Runs that
    submitit has started are left to submitit, which does the same.
    """

    def __init__(self, run_dir: str | Path, grace_seconds: float, requeue: bool = True) -> None:
        self.marker = Path(run_dir) / PREEMPTED
        self.grace_seconds, self.requeue = grace_seconds, requeue
        self._signals = StopSignals(self._start_clock)
        self._clock: threading.Timer | None = None
        self._stopping: int = 0
        self._saved_step = 0
        self._is_zero = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._is_zero = trainer.is_global_zero
        if self._is_zero:
            self.marker.unlink(missing_ok=True)
        # Before the data-loading processes are made.
        for number in (signal.SIGINT, *PREEMPTING):
            self._signals.install(number)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._saved_step = trainer.global_step
        # Again, over Lightning's own, which it has just installed: it can deadlock when one rank alone gets the signal.
        for number in PREEMPTING:
            self._signals.install(number)
        self._signals.deferring = True

    def on_optimizer_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        # Not between micro-batches: a state in the middle of a step cannot be saved.
        (number,) = all_reduce_max([self._signals.received or 0])
        if number and not self._stopping:
            self._stopping = number
            # Also on ranks that got no signal.
            self._start_clock()
            checkpoint = trainer.checkpoint_callback
            assert isinstance(checkpoint, RunCheckpoint)
            checkpoint.save_now(trainer)
            self._saved_step = step
            self._leave_marker()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._stopping:
            # A barrier, so that every rank has saved: a launcher may end all of them when the first one leaves.
            all_reduce_max([0])
            raise Interrupted(self._stopping)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signals.deferring = False
        self._stop_clock()
        if self._is_zero:
            # The signal came with the last step.
            self.marker.unlink(missing_ok=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop_clock()
        self._give_back_signals()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        signum = exception.signum if isinstance(exception, Interrupted) else 0
        # It may have come before the first step.
        self._stopping = signum if signum in PREEMPTING else 0
        self._give_back_signals()
        if not self._stopping:
            self._stop_clock()
        elif self._is_zero:
            self._leave_marker(self._requeue())

    def _give_back_signals(self) -> None:
        """Except that a process which is leaving only notes further ones: launchers send them to slow ranks."""
        if self._stopping in PREEMPTING:
            self._signals.deferring = True
        else:
            self._signals.restore()

    def _leave_marker(self, requeued: bool = False) -> None:
        if not self._is_zero or self._stopping == signal.SIGINT:
            return
        content = {
            "signal": signal.Signals(self._stopping).name,
            "step": self._saved_step,
            "time": time.time(),
            "exit_code": EXIT_REQUEUE,
            "requeued": requeued,
        }
        try:
            write_json(self.marker, content, parents=False)
        except UserError as error:
            # The exit code says the same.
            print(error, file=sys.stderr, flush=True)

    def _requeue(self) -> bool:
        """Whether SLURM has accepted to requeue this job."""
        job = slurm_job()
        if not (self.requeue and job and self._stopping in REQUEUING):
            return False
        try:
            done = subprocess.run(
                ["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False
            )
            problem = done.stderr.strip() or f"code {done.returncode}" if done.returncode else ""
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = str(error)
        print(f"scontrol requeue {job}: {problem or 'done'}", file=sys.stderr, flush=True)
        return not problem

    # ---- the grace period ---------------------------------------------------------------------------------------

    def _start_clock(self) -> None:
        """Once. A person's Ctrl-C has no deadline; a second one ends the wait."""
        if self._clock is None and (self._stopping or self._signals.received) != signal.SIGINT:
            self._clock = threading.Timer(self.grace_seconds, self._out_of_time)
            self._clock.daemon = True
            self._clock.start()

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()

    def _out_of_time(self) -> None:
        """In a thread of its own: the main one is busy with what takes too long."""
        self._stopping = self._stopping or self._signals.received or signal.SIGTERM
        print(
            f"callbacks.grace_seconds={self.grace_seconds:g} after {signal.Signals(self._stopping).name} are over: "
            f"ending now; the same command resumes the run from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        if self._is_zero:
            self._leave_marker(self._requeue())
        os._exit(EXIT_REQUEUE)


def slurm_job() -> str | None:
    """This job's name for `scontrol requeue`: its id, or <array>_<task>. None outside of SLURM or under submitit."""
    environment = os.environ
    if "SUBMITIT_EXECUTOR" in environment:
        return None
    if "SLURM_ARRAY_JOB_ID" in environment and "SLURM_ARRAY_TASK_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID")
