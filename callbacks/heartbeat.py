"""Heartbeat files of every rank in the run folder, and a watchdog that ends a run without progress.

heartbeat/rank_<r>.json, written every few seconds by a thread of its own, so that a stuck process still says where:
{"format": 1, "rank", "world_size", "host", "pid", "step", "phase", "since", "idle", "time", "status"[, "printed"]}.
phase: starting, data, forward, backward, optimizer, callbacks, checkpoint, validation, ending. since: Unix seconds when
the phase (or the batch in it) began; idle: seconds without progress; time: when the file was written, the sign of life
of the process; status: running, finished, failed, interrupted or hung; printed: the stacks of a process that hangs have
been printed. A step without progress for a minute is a line in the log, too.

The watchdog compares `since` with the clock. A collective that hangs stalls all ranks; the first one to notice
leaves heartbeat/hung, upon which all of them print their Python stacks, and the process ends with EXIT_HUNG.
"""

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from switti.contracts import WaitingLoader
from switti.errors import EXIT_HUNG, UserError
from switti.files import read_json_object, temporary_beside, writing
from switti.run_folder import FORMAT, HEARTBEAT, HUNG, rank_file, read_record, write_record

# How long the other ranks get to print before this one ends: heartbeats, and seconds on top.
_PATIENCE, _SLOWEST = 4, 10.0
# Phases of a step, which last for seconds; callbacks may take longer.
_STEP = ("data", "forward", "backward", "optimizer")
_STANDSTILL = 60.0
log = logging.getLogger(__name__)


class Heartbeat(Callback):
    """Place it first among the callbacks: `callbacks` is then the time that all of them take after a batch.

    every: seconds between two writings. watchdog: seconds without progress that end the run; 0 for never.
    """

    def __init__(self, run_dir: str | Path, every: float, watchdog: float) -> None:
        self.folder = Path(run_dir) / HEARTBEAT
        self.every, self.watchdog = every, watchdog
        self.state: dict[str, Any] = {}
        self._trainer: Trainer | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # ---- the main thread: note where it is ----------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or self._thread is not None:
            return
        self._trainer = trainer
        if trainer.is_global_zero:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            for path in (*self.folder.glob(rank_file("*")), self.folder / HUNG):
                # Left by another attempt, perhaps with more ranks.
                path.unlink(missing_ok=True)
        trainer.strategy.barrier()
        self.state = {
            "format": FORMAT,
            "rank": trainer.global_rank,
            "world_size": trainer.world_size,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "status": "running",
        }
        self._enter("starting")
        # At once, however busy the machine is.
        self._write()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def _enter(self, phase: str) -> None:
        step = 0 if self._trainer is None else self._trainer.global_step
        self.state |= {"step": step, "phase": phase, "since": time.time(), "tick": time.monotonic()}

    def waiting_for_data(self) -> None:
        """The loader calls it before each batch of training."""
        self._enter("data")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader = trainer.train_dataloader
        if isinstance(loader, WaitingLoader):
            loader.waiting = self.waiting_for_data

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._enter("forward")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._enter("backward")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._enter("optimizer")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._enter("callbacks")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._enter("checkpoint")

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._enter("validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter("callbacks")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter("ending")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end("finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end("interrupted" if isinstance(exception, KeyboardInterrupt | SystemExit) else "failed")

    def _end(self, status: str) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
            self.state["status"] = status
            self._write()

    # ---- the thread: write, and watch ---------------------------------------------------------------------------

    def _beat(self) -> None:
        last, warned = time.monotonic(), False
        while True:
            self._write()
            if self._stop.wait(self.every):
                return
            now = time.monotonic()
            if now - last > 2 * self.every + 10:
                # The process was suspended as a whole, which is not a hang.
                self.state["tick"] = now
            last = now
            stalled = self.state["phase"] in _STEP and now - self.state["tick"] > _STANDSTILL
            if stalled and not warned:
                log.warning(self._standstill())
            warned = stalled
            if self.watchdog and (now - self.state["tick"] > self.watchdog or (self.folder / HUNG).exists()):
                self._end_hung()

    def _standstill(self) -> str:
        """One line; a wait for data may be for a disk, a network or a stream."""
        ends = (
            f"callbacks.watchdog_seconds={self.watchdog:g} ends the run"
            if self.watchdog
            else "the watchdog is off"
        )
        return (
            f"rank {self.state['rank']}: no progress for {_STANDSTILL:.0f} s at step {self.state['step']}, in "
            f"{self.state['phase']}; {ends}"
        )

    def _write(self) -> None:
        """Atomic, but not synced: it is worth nothing after a crash of the machine."""
        content = {key: value for key, value in self.state.items() if key != "tick"}
        content |= {"idle": round(time.monotonic() - self.state["tick"], 1), "time": time.time()}
        path = self._path(self.state["rank"])
        # A full disk must not end the thread that watches.
        with suppress(OSError):
            temporary = temporary_beside(path)
            temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
            temporary.replace(path)

    def _path(self, rank: int) -> Path:
        return self.folder / rank_file(rank)

    def _end_hung(self) -> None:
        """Say where all ranks stand, print the stacks of this one, wait for the others to do so, and end."""
        self.state["status"] = "hung"
        self._write()
        rank = self.state["rank"]
        with suppress(OSError):
            (self.folder / HUNG).touch()
        print(f"rank {rank}: {hung_message(self.watchdog)}\n{self.standing()}", file=sys.stderr, flush=True)
        print(f"rank {rank}, Python stacks:", file=sys.stderr, flush=True)
        # By its descriptor: sys.stderr may not be a file.
        faulthandler.dump_traceback(file=2, all_threads=True)
        self._record()
        self.state["printed"] = True
        self._write()
        until = time.monotonic() + _PATIENCE * self.every + _SLOWEST
        while time.monotonic() < until and not self._all_printed():
            time.sleep(min(1.0, self.every))
        os._exit(EXIT_HUNG)

    def _all_printed(self) -> bool:
        """Whether every rank has printed its stacks: the first one that ends makes the launcher end the others."""
        try:
            return all(
                read_json_object(self._path(r)).get("printed") for r in range(self.state["world_size"])
            )
        except (OSError, UserError):
            return False

    def standing(self) -> str:
        """One line per rank, as their files say."""
        now, lines = time.time(), []
        for other in range(self.state["world_size"]):
            try:
                beat = read_json_object(self._path(other))
                lines.append(
                    f"  rank {other} ({beat['host']}, pid {beat['pid']}): step {beat['step']}, {beat['phase']} "
                    f"for {now - beat['since']:.0f} s, last seen {now - beat['time']:.0f} s ago"
                )
            except (OSError, KeyError, UserError):
                lines.append(f"  rank {other}: no sign of life in {self._path(other)}")
        return "\n".join(lines)

    def _record(self) -> None:
        """The main thread is stuck, so that nobody else would write it to the record."""
        run_dir = self.folder.parent
        with suppress(OSError, UserError):
            if self.state["rank"] == 0 and (record := read_record(run_dir)):
                write_record(run_dir, record | {"status": "failed", "error": hung_message(self.watchdog)})


def hung_message(seconds: float) -> str:
    return f"no progress for more than callbacks.watchdog_seconds={seconds:g}"
