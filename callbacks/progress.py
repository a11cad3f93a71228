"""Progress bar in optimizer steps, also after a resume, with the rate of this attempt."""

import os
import sys
from contextlib import suppress
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from switti.errors import UserError
from switti.files import writing


class StepProgress(TQDMProgressBar):
    """Lightning's bar counts the batches of an epoch; a run is measured in optimizer steps and may begin in the middle.

    every: steps between two updates.
    """

    def __init__(self, every: int) -> None:
        super().__init__(refresh_rate=every)

    def init_train_tqdm(self) -> Tqdm:
        return Tqdm(
            desc="training",
            total=self.trainer.max_steps,
            initial=self.trainer.global_step,
            unit="step",
            disable=self.is_disabled,
            leave=True,
            dynamic_ncols=True,
            file=_Screen(),
            smoothing=0,
            bar_format=self.BAR_FORMAT,
        )

    def on_train_epoch_start(self, *_: Any) -> None:
        """No-op: an epoch's end is not the run's."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        bar, step = self.train_progress_bar, trainer.global_step
        # The step stays the same while gradients accumulate.
        if step != bar.n and self._should_update(step, trainer.max_steps) and not bar.disable:
            bar.n = step
            bar.set_postfix(self.get_metrics(trainer, pl_module))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the line, so that the error begins a new one."""
        # The first error is the one to report.
        with suppress(UserError):
            for bar in (self._val_progress_bar, self._train_progress_bar):
                if bar is not None:
                    bar.close()
            _Screen().flush()


class _Screen:
    """Standard output; where it is a file on a full disk, the error says which one."""

    def write(self, text: str) -> int:
        with writing(_name_of_output()):
            return sys.stdout.write(text)

    def flush(self) -> None:
        with writing(_name_of_output()):
            sys.stdout.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)


def _name_of_output() -> str:
    try:
        return os.readlink(f"/proc/self/fd/{sys.stdout.fileno()}")
    except (OSError, ValueError):
        return "the standard output"
