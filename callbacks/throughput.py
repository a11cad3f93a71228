"""Throughput: seconds per step, samples per second and peak memory, as curves."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from callbacks.base import OptimizerStepCallback, log_now
from callbacks.run_record import peak_memory


class Throughput(OptimizerStepCallback):
    """Logs time/step_seconds, time/samples_per_second and memory/peak_gib as means over `every` optimizer steps.

    Validation and sampling between steps do not count. batch: samples of one optimizer step over all ranks.
    """

    def __init__(self, every: int, batch: int) -> None:
        self.every = every
        self.batch = batch
        self._began = 0.0
        self._seconds = 0.0
        self._steps = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._seconds += time.perf_counter() - self._began
        super().on_train_batch_end(trainer, pl_module, *args)

    def on_optimizer_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        self._steps += 1
        if self._steps < self.every:
            return
        seconds = self._seconds / self._steps
        values = {
            "time/step_seconds": seconds,
            "time/samples_per_second": self.batch / seconds,
            "memory/peak_gib": peak_memory(module.device) / 2**30,
        }
        log_now(trainer, values)
        self._seconds, self._steps = 0.0, 0
