"""Seconds a step, samples a second and peak memory, as curves."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.run_record import peak_memory


class Speed(Callback):
    """Logs time/step_seconds, time/samples_per_second and memory/peak_gib as means over `every` optimiser steps.

    Validation and sampling between steps do not count. batch: samples of one optimiser step over all ranks.
    """

    def __init__(self, every: int, batch: int) -> None:
        self.every = every
        self.batch = batch
        self._begun = 0.0
        self._seconds = 0.0
        self._steps = 0
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._begun = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._seconds += time.perf_counter() - self._begun
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        self._steps += 1
        if self._steps < self.every:
            return
        seconds = self._seconds / self._steps
        values = {
            "time/step_seconds": seconds,
            "time/samples_per_second": self.batch / seconds,
            "memory/peak_gib": peak_memory(pl_module.device) / 2**30,
        }
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        self._seconds, self._steps = 0.0, 0
