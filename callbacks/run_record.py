"""Run record: record.json with a run's settings, code, data, machine, progress and end."""

import logging
import os
import platform
import resource
import shlex
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.base import data_module
from callbacks.csv_logger import CompletedSteps
from switti.contracts import DescribedData, EMAModule, TokenizedModule
from switti.environment import masked
from switti.errors import UserError
from switti.run_folder import CONFIG, FORMAT, check_present, read_record, write_record

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0
# Between two checks that the run folder still exists.
LOOK_SECONDS = 1.0
# Kept of a resumed run even if it fails before its first step.
_HISTORY = ("resumed", "data", "parameters")
_PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "transformers", "omegaconf", "numpy")


class RunRecord(Callback):
    """Keeps record.json true from the start of `fit` to its end; only rank zero writes, atomically.

    A run that ends by an exception is `failed` with the error's last line, one stopped by a signal `interrupted`; a
    process that was killed leaves `running` with its `pid` and the time of its last sign of life in `updated`.
    tokens_per_image: length of the token pyramid, for the report's throughput. metrics: facts about metrics of the
    user's own, by label, since reports do not import them. Place it before callbacks that log when training starts.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        name: str,
        study: str | None,
        task: str,
        seed: int,
        tokens_per_image: int,
        metrics: dict[str, Any] | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.record: dict[str, Any] = {
            "format": FORMAT,
            "name": name,
            "study": study,
            "task": task,
            "seed": seed,
            "tokens_per_image": tokens_per_image,
        }
        if metrics:
            self.record["metrics"] = metrics
        self._previous: dict[str, Any] = read_record(run_dir) or {}
        self.record |= {key: self._previous[key] for key in _HISTORY if key in self._previous}
        self._training_since: float | None = None
        self._written = self._looked = time.monotonic()
        self._place: tuple[int, int, bool] | None = None
        # Open, so that no other folder gets this one's number while the run lasts.
        self._descriptor: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._place = _place(self.run_dir)
        if self._place is not None and self._descriptor is None:
            self._descriptor = os.open(self.run_dir, os.O_RDONLY)
        self.record |= {
            "status": "running",
            "error": None,
            "started": _now(),
            "ended": None,
            "command": masked(shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]])),
            "pid": os.getpid(),
            **git_state(Path(__file__).parent),
            "versions": versions(),
            "device": _device_name(pl_module.device),
            "host": socket.gethostname(),
            "world_size": trainer.world_size,
            "max_steps": trainer.max_steps,
        }

    def note_early_stop(self, stop: dict[str, Any]) -> None:
        """The run ends before max_steps, and is then finished. stop: its reason and step, and what decided it."""
        self.record["early_stop"] = stop

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Restored by now, if there was a checkpoint.
        step = trainer.global_step
        for logger in trainer.loggers:
            if isinstance(logger, CompletedSteps):
                logger.follow(trainer)
                # From the start, also what was logged before the first step is logged again.
                logger.rewind(step or -1)
        if step:
            self.record["started"] = self._previous.get("started", self.record["started"])
            self.record["resumed"] = [*self._previous.get("resumed", []), step]
        else:
            # An earlier attempt has left nothing to resume from.
            self._previous = {}
            self.record["resumed"] = []
        if trainer.is_global_zero:
            data = data_module(trainer)
            contents = data.contents if isinstance(data, DescribedData) else {}
            self.record["data"] = join_contents(self._previous.get("data", {}), contents)
        self.record["parameters"] = count_parameters(pl_module)
        self._training_since = time.monotonic()
        self._write(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._heartbeat(trainer, pl_module)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not trainer.sanity_checking:
            self._heartbeat(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.record |= {"status": "finished", "ended": _now()}
        self._write(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        interrupted = isinstance(exception, KeyboardInterrupt | SystemExit)
        self.record |= {
            "status": "interrupted" if interrupted else "failed",
            "error": None if interrupted else masked(last_line(exception)),
            "ended": _now(),
        }
        # The disk may be what failed; the first error is the one to report.
        with suppress(UserError):
            self._write(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _heartbeat(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and time.monotonic() - self._looked >= LOOK_SECONDS:
            self._check_place()
        if time.monotonic() - self._written >= HEARTBEAT_SECONDS:
            self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._written = time.monotonic()
        if not trainer.is_global_zero:
            return
        self._check_place()
        began = self._training_since
        seconds = self._previous.get("train_seconds", 0.0) + (
            self._written - began if began is not None else 0.0
        )
        self.record |= {
            "updated": _now(),
            "step": trainer.global_step if began is not None else self._previous.get("step", 0),
            "train_seconds": round(seconds, 3),
            "peak_memory_bytes": peak_memory(pl_module.device),
        }
        write_record(self.run_dir, self.record)

    def _check_place(self) -> None:
        """A folder that is removed or renamed under a run is not recreated, and another in its place is not ours."""
        self._looked = time.monotonic()
        check_present(self.run_dir)
        if self._place is not None and _place(self.run_dir) != self._place:
            raise UserError(
                f"{self.run_dir} has been removed, emptied or replaced while the run was training; the run ends here"
            )


def _place(run_dir: Path) -> tuple[int, int, bool] | None:
    """(device, inode, whether it has a config.yaml) of the run folder; None if there is none."""
    try:
        status = run_dir.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, (run_dir / CONFIG).exists()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def join_contents(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Data digest per split; if the data changed between resumes, the digests are joined by '+'."""
    joined = {}
    for split, content in now.items():
        digest, old = content["digest"], before.get(split, {}).get("digest", content["digest"])
        if old.rpartition("+")[2] != digest:
            log.warning("data.%s: the shards hold other samples than when the run began", split)
            old = f"{old}+{digest}"
        joined[split] = content | {"digest": old}
    return joined


def last_line(exception: BaseException) -> str:
    """ "ValueError: the message's last line"."""
    lines = str(exception).strip().splitlines()
    return f"{type(exception).__name__}: {lines[-1]}" if lines else type(exception).__name__


def git_state(folder: Path) -> dict[str, Any]:
    """{"commit", "dirty"} of the checkout; both null outside of git. dirty counts tracked files only."""

    def git(*arguments: str) -> str | None:
        with suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(
                ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False
            )
            return done.stdout.strip() if done.returncode == 0 else None
        return None

    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def versions() -> dict[str, str]:
    """Python and the packages that numbers depend on, as installed."""
    installed = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed


def count_parameters(pl_module: LightningModule) -> dict[str, int]:
    """{"trained", "frozen"}: numbers, each parameter once. The EMA of the trained ones counts as neither."""
    pairs = pl_module.ema_pairs() if isinstance(pl_module, EMAModule) else []
    averages = {id(parameter) for ema, _ in pairs for parameter in ema.parameters()}
    parameters = {id(parameter): parameter for parameter in pl_module.parameters()}
    if isinstance(pl_module, TokenizedModule):
        parameters |= {id(parameter): parameter for parameter in pl_module.tokenizer.parameters()}
    counted = [parameter for key, parameter in parameters.items() if key not in averages]
    trained = sum(parameter.numel() for parameter in counted if parameter.requires_grad)
    return {"trained": trained, "frozen": sum(parameter.numel() for parameter in counted) - trained}


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, this process's largest resident size otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
