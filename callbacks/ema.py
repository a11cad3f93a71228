"""Exponential moving average of the trained weights."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.skipped_steps import was_skipped
from switti.distributed.optimizer_state import local_part


class ExponentialMovingAverage(Callback):
    """Updates the copies that `pl_module.averaged_pairs()` names, once an optimiser step that was not left out.

    decay: weight of the old average, in (0, 1). Early on it is min(decay, (1 + n)/(10 + n)) after n steps, so that
    the first, random weights are forgotten. The copies belong to the module, which saves and shards them.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step == self._last_step:  # gradients are still accumulating
            return
        self._last_step = step
        if was_skipped(pl_module):
            return
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step))
        for average, source in pl_module.averaged_pairs():
            averages = [local_part(p) for p in average.parameters()]
            sources = [local_part(p) for p in source.parameters()]
            torch._foreach_lerp_(averages, sources, weight)
