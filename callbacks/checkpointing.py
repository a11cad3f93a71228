"""Checkpoints that are whole or absent: atomic writing, the newest readable one, saving when a signal stops the run."""

import logging
import shutil
import signal
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.config import CallbacksConfig
from callbacks.stopping import Interrupted, StopSignals
from switti.errors import UserError
from switti.files import atomic_write

log = logging.getLogger(__name__)

FOLDER = "checkpoints"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs and renames, so that a full disk or a kill leaves the previous file valid.

    Reading and removing are Lightning's. Raises UserError with path and free space when writing fails.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        if storage_options is not None:
            raise TypeError("AtomicCheckpointIO writes local files; it knows no storage_options")
        try:
            with atomic_write(path) as temporary, temporary.open("wb") as stream:
                torch.save(checkpoint, stream)
        except (OSError, RuntimeError) as error:  # torch reports a short write as a RuntimeError
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise UserError(
                f"cannot write checkpoint {path}: {reason} ({_free_space(Path(path).parent)} free); "
                "make room and start the run again, it goes on from the previous checkpoint"
            ) from error


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB"
    except OSError:
        return "unknown space"


class RunCheckpoint(ModelCheckpoint):
    """step_000500.ckpt every `every` optimiser steps and at the end; the newest `keep_last` stay; last.ckpt links.

    SIGINT or SIGTERM to any rank: all ranks finish the step, save, run a validation that is due, and raise
    `Interrupted`. A second SIGINT stops at once. Resuming then repeats nothing and skips nothing.
    """

    def __init__(self, folder: str | Path, every: int, keep_last: int) -> None:
        super().__init__(
            dirpath=folder,
            filename="step_{step:06d}",
            auto_insert_metric_name=False,
            every_n_train_steps=every,
            monitor="step",  # newest first: the way to say "keep the last k"
            mode="max",
            save_top_k=keep_last,
            save_last="link",
            enable_version_counter=False,
        )
        self._signals = StopSignals()
        self._stopping = False
        self._seen_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        with warnings.catch_warnings():  # the folder of a run that goes on is not empty, as it should be
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        for number in (signal.SIGINT, signal.SIGTERM):  # before the data-loading processes are made
            self._signals.install(number)
        if trainer.is_global_zero:
            clear_leftovers(Path(str(self.dirpath)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._seen_step = trainer.global_step
        self._last_global_step_saved = trainer.global_step
        # Again, over Lightning's own, which it has just installed: it can deadlock when one rank alone is told.
        self._signals.install(signal.SIGTERM)
        self._signals.deferring = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        if trainer.global_step == self._seen_step:
            return  # gradients are being accumulated; a state in the middle of a step cannot be saved
        self._seen_step = trainer.global_step
        if trainer.strategy.reduce_boolean_decision(self._signals.received is not None, all=False):
            self._stopping = True
            self._save_now(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._stopping:
            raise Interrupted(self._signals.received or signal.SIGTERM)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signals.deferring = False
        self._save_now(trainer)
        super().on_train_end(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._signals.restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._signals.restore()  # and no checkpoint: the state in the middle of a step would not be resumable

    def _save_now(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        """Also the one that was resumed from, which Lightning would keep for good: one more at every resume."""
        return previous != current and Path(previous).parent == Path(current).parent


def build_checkpoint_callback(config: CallbacksConfig, run_dir: str | Path) -> RunCheckpoint:
    """The run's checkpoint callback; give the trainer an AtomicCheckpointIO besides."""
    return RunCheckpoint(Path(run_dir) / FOLDER, config.checkpoint_every, config.keep_last)


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed process left of a checkpoint that it was writing."""
    for path in folder.glob(".*.tmp"):
        log.warning("removing %s, a checkpoint whose writing was cut off", path)
        path.unlink(missing_ok=True)


def find_resume(run_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run that can be read whole, or None. Damaged ones are named and passed over."""
    candidates = sorted((Path(run_dir) / FOLDER).glob("step_*.ckpt"), key=_step_of, reverse=True)
    for path in candidates:
        reason = damage(path)
        if reason is None:
            return path
        log.warning("checkpoint %s cannot be used (%s); trying the one before it", path, reason)
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, or None: all its bytes are compared with their checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
            if broken is not None:
                return f"{broken} is damaged"
            if not any(name.endswith("data.pkl") for name in archive.namelist()):
                return "it is not a checkpoint"
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        return str(error) or type(error).__name__
    return None


def _step_of(path: Path) -> int:
    digits = path.stem.removeprefix("step_")
    return int(digits) if digits.isdigit() else -1
