"""Checkpoint callback: when checkpoints are written, which of them stay, and which one a run resumes from."""

import logging
import re
import zipfile
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.base import OptimizerStepCallback
from callbacks.checkpoint_io import AtomicCheckpointIO
from callbacks.config import CallbacksConfig
from switti.distributed.collectives import all_gather_object, all_reduce_max
from switti.distributed.sharded_checkpoint import corruption as shard_corruption
from switti.distributed.sharded_checkpoint import remove
from switti.errors import UserError
from switti.files import open_regular, read_json_object, write_json, writing
from switti.run_folder import CHECKPOINTS
from switti.weights.torch_files import TorchFileError, check_torch

log = logging.getLogger(__name__)

_BEST = "best.json"
_NAME = re.compile(r"step_(\d+)\.ckpt")


class RunCheckpoint(OptimizerStepCallback, Checkpoint):
    """step_000500.ckpt every `every` optimizer steps and at the end; last.ckpt and best.ckpt are links.

    The newest `keep_last` stay; with keep_every those of every such step; with best_metric the one whose validation
    had the best value, for which one is written whenever a validation finds a better value.

    Training continues while a copy of the state is written; the checkpoint gets its name at the end of a later step,
    when everything that was logged up to its step is in the files as well. Where a validation is due, it comes first.
    So a kill at any moment loses steps, which are repeated, but never a value of a curve. A failure to write ends the
    run on all ranks. An exception saves nothing new: the state in the middle of a step would not be resumable. Signals
    do, through `callbacks.preemption`.
    """

    def __init__(
        self,
        folder: str | Path,
        every: int,
        keep_last: int,
        keep_every: int = 0,
        best_metric: str | None = None,
        best_mode: Literal["min", "max"] = "min",
    ) -> None:
        self.folder = Path(folder)
        self.every, self.keep_last, self.keep_every = every, keep_last, keep_every
        self.best_metric, self.best_mode = best_metric, best_mode
        # step and value, known to rank zero
        self._best: dict[str, Any] = {}
        self._saved_step = 0
        # Step of the checkpoint that is being written.
        self._pending: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO):
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if trainer.is_global_zero:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                clear_leftovers(self.folder)
        if len(set(all_gather_object(trainer.ckpt_path is not None))) > 1:
            raise UserError(
                f"not all ranks see the checkpoints in {self.folder}; runs_dir must be shared by all nodes"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._saved_step = step = trainer.global_step
        best = read_best(self.folder)
        same = bool(best) and (best["metric"], best["mode"]) == (self.best_metric, self.best_mode)
        self._best = best if same and best["step"] <= step and self._path(best["step"]).exists() else {}

    def on_optimizer_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        # Not between micro-batches: a state in the middle of a step cannot be saved.
        self._settle(trainer)
        if step % self.every == 0 and not _validation_follows(trainer):
            self._begin(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if self._note_best(trainer) or trainer.global_step % self.every == 0:
            self._begin(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save_now(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.world_size == 1:
            # With more ranks, the others may be gone.
            # The first error is the one to report.
            with suppress(UserError):
                self._settle(trainer, wait=True)

    def save_now(self, trainer: Trainer) -> None:
        """Save this step, unless that has been done; returns when the checkpoint is complete."""
        self._begin(trainer)
        self._settle(trainer, wait=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}.ckpt"

    def _begin(self, trainer: Trainer) -> None:
        if trainer.global_step == self._saved_step:
            return
        self._settle(trainer, wait=True)
        self._saved_step = self._pending = trainer.global_step
        with _io(trainer).in_background():
            trainer.save_checkpoint(self._path(self._pending))

    def _settle(self, trainer: Trainer, wait: bool = False) -> None:
        """Publish what all ranks have finished writing. UserError on all ranks if one of them failed."""
        if self._pending is None:
            return
        io = _io(trainer)
        if wait:
            io.wait()
        busy, failed = all_reduce_max([io.busy(), io.failure is not None])
        if busy:
            return
        step, self._pending = self._pending, None
        if failed:
            raise UserError(io.failure or f"another rank cannot write checkpoint {self._path(step)}")
        with writing(self._path(step)):
            io.publish()
            if trainer.is_global_zero:
                _link(self.folder / "last.ckpt", self._path(step))
                self._keep_best()
                self._prune(step)

    # ---- which ones stay (rank zero) ----------------------------------------------------------------------------

    def _note_best(self, trainer: Trainer) -> bool:
        """Whether this validation was the best so far, as rank zero sees it."""
        if self.best_metric is None:
            return False
        if self.best_metric not in trainer.callback_metrics:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if "_by_scale" not in name))
            raise UserError(
                f"callbacks.best_metric={self.best_metric} is not known after a validation; known are {known}"
            )
        value = float(trainer.callback_metrics[self.best_metric])
        before = self._best.get("value")
        sign = 1 if self.best_mode == "max" else -1
        better = trainer.is_global_zero and (before is None or sign * value > sign * before)
        if better:
            self._best = {
                "step": trainer.global_step, "metric": self.best_metric, "mode": self.best_mode, "value": value,
            }  # fmt: skip
            self._keep_best()
        return bool(all_reduce_max([better])[0])

    def _keep_best(self) -> None:
        if self._best and (path := self._path(self._best["step"])).exists():
            write_json(self.folder / _BEST, self._best, parents=False)
            _link(self.folder / "best.ckpt", path)

    def _prune(self, newest: int) -> None:
        """Later ones than the newest can only be corrupt ones that were skipped when the run was resumed."""
        steps = sorted(steps_in(self.folder))
        kept = {step for step in steps if step <= newest}
        kept = set(sorted(kept)[-self.keep_last :])
        kept |= {step for step in steps if self.keep_every and step % self.keep_every == 0 and step <= newest}
        protected = read_best(self.folder).get("step")
        for step in set(steps) - kept - {protected, self._best.get("step")}:
            remove(self._path(step))


def _io(trainer: Trainer) -> AtomicCheckpointIO:
    io = trainer.strategy.checkpoint_io
    # Set by `setup`.
    assert isinstance(io, AtomicCheckpointIO)
    return io


def _validation_follows(trainer: Trainer) -> bool:
    every = trainer.val_check_batch
    return (
        trainer.enable_validation
        and isinstance(every, int)
        and trainer.check_val_every_n_epoch is None
        and (trainer.fit_loop.total_batch_idx + 1) % every == 0
    )


def _link(link: Path, target: Path) -> None:
    """A relative link, replaced atomically."""
    temporary = link.with_name(f".{link.name}.tmp")
    with writing(link):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target.name)
        temporary.replace(link)


def build_checkpoint_callback(config: CallbacksConfig, run_dir: str | Path) -> RunCheckpoint:
    """The run's checkpoint callback."""
    return RunCheckpoint(
        Path(run_dir) / CHECKPOINTS,
        config.checkpoint_every,
        config.keep_last,
        config.keep_every,
        config.best_metric,
        config.best_mode,
    )


# ---- finding them -----------------------------------------------------------------------------------------------


def read_best(folder: Path) -> dict[str, Any]:
    """step, metric, mode and value of the best checkpoint; {} if there is none or its file cannot be used."""
    try:
        best = read_json_object(folder / _BEST)
    except UserError as error:
        log.warning("%s", error)
        return {}
    kinds = {"step": int, "value": int | float, "metric": str, "mode": str}
    return best if all(isinstance(best.get(key), kind) for key, kind in kinds.items()) else {}


def clear_leftovers(folder: Path) -> None:
    """Remove leftovers of a killed process that was writing or removing a checkpoint."""
    for path in folder.glob(".*.tmp"):
        if not path.is_symlink():
            log.warning("removing %s, left of a checkpoint that was only partly written", path)
        remove(path)


def steps_in(folder: Path) -> Iterable[int]:
    """Steps of the checkpoints in a folder, in no order."""
    names = (_NAME.fullmatch(path.name) for path in folder.glob("step_*.ckpt"))
    return [int(name[1]) for name in names if name]


def checkpoints_of(run_dir: str | Path) -> list[Path]:
    """A run's checkpoints, intact or not, newest first."""
    folder = Path(run_dir) / CHECKPOINTS
    return [folder / f"step_{step:06d}.ckpt" for step in sorted(steps_in(folder), reverse=True)]


def find_resume(run_dir: str | Path, thorough: bool = True) -> Path | None:
    """The newest intact checkpoint of a run, or None. Corrupt ones are named and skipped.

    thorough: compare the bytes of sharded ones with their checksums. Of many ranks only rank zero needs to, whose
    choice counts; the others look at names and sizes.
    """
    for path in checkpoints_of(run_dir):
        reason = corruption(path, thorough)
        if reason is None:
            return path
        log.warning("checkpoint %s cannot be used (%s); trying the one before it", path, reason)
    return None


def corruption(path: Path, thorough: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None for an intact one: all its bytes are compared with their checksums."""
    if path.is_dir():
        return shard_corruption(path, thorough)
    try:
        with open_regular(path) as stream:
            check_torch(stream)
            broken = zipfile.ZipFile(stream).testzip()
    except (
        OSError, UserError, TorchFileError, zipfile.BadZipFile, EOFError,
        NotImplementedError, RuntimeError, ValueError, zlib.error,
    ) as error:  # fmt: skip
        return str(error) or type(error).__name__
    return None if broken is None else f"{broken} is corrupt"
