"""The base class of callbacks that act once per optimizer step, and log at once."""

from collections.abc import Mapping
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from switti.contracts import TrainingData


class OptimizerStepCallback(Callback):
    """Calls `on_optimizer_step_end` once after each completed optimizer step, however many micro-batches it has.

    Lightning's own hooks run after each micro-batch, and `trainer.global_step` stays the same while gradients
    accumulate. Subclasses that override `on_train_start` or `on_train_batch_end` call these here as well.
    """

    _completed_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Restored by now, if there was a checkpoint: the step that it was saved at is not completed once more.
        self._completed_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step != self._completed_step:
            self._completed_step = step
            self.on_optimizer_step_end(trainer, pl_module, step)

    def on_optimizer_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """After the last micro-batch of a step, also of a skipped one. step: how many are completed."""


def log_now(trainer: Trainer, values: Mapping[str, float | Tensor]) -> None:
    """Write values to all loggers at the current step, whatever interval the trainer logs at."""
    for logger in trainer.loggers:
        logger.log_metrics({name: float(value) for name, value in values.items()}, step=trainer.global_step)


def data_module(trainer: Trainer) -> TrainingData:
    """The data module of the run, which Lightning attaches to its trainer."""
    return cast(TrainingData, getattr(trainer, "datamodule", None))
