"""Counts the optimiser steps that were left out because a loss or gradient was no finite number, and ends the run."""

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from switti.errors import UserError

log = logging.getLogger(__name__)


def was_skipped(pl_module: LightningModule) -> bool:
    """Whether the last optimiser step was left out; modules that do not guard their steps leave none out."""
    return getattr(getattr(pl_module, "finite_steps", None), "skipped", False)


class SkippedSteps(Callback):
    """Logs train/skipped_steps, their number since the run began, whenever it grows.

    More than `total` of them, or more than `in_a_row`, are a UserError on all ranks, before a checkpoint of that step
    is written. The numbers are part of checkpoints.
    """

    def __init__(self, total: int, in_a_row: int) -> None:
        self.limit_total, self.limit_in_a_row = total, in_a_row
        self.total = self.in_a_row = 0
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == self._step:
            return  # gradients are being accumulated
        self._step = trainer.global_step
        if not was_skipped(pl_module):
            self.in_a_row = 0
            return
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        for logger in trainer.loggers:
            logger.log_metrics({"train/skipped_steps": self.total}, step=self._step)
        _warn(f"step {self._step} skipped: its loss or gradient is not finite ({self.total} in all)")
        for count, limit, setting, words in (
            (self.in_a_row, self.limit_in_a_row, "max_skipped_in_a_row", "in a row"),
            (self.total, self.limit_total, "max_skipped_steps", "in all"),
        ):
            if count > limit:
                raise UserError(
                    f"step {self._step}: {count} steps {words} had a loss or gradient that is not finite, more than "
                    f"callbacks.{setting}={limit}; the weights are those of the last finite step, and so are the "
                    "checkpoints. Lower optimizer.learning_rate, raise optimizer.warmup_steps, or set "
                    "trainer.precision=32-true"
                )

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.total, self.in_a_row = state_dict["total"], state_dict["in_a_row"]


@rank_zero_only
def _warn(message: str) -> None:
    log.warning(message)
