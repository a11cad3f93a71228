"""Exponential moving average (EMA) of the trained weights.

Lightning's own `EMAWeightAveraging` copies the module with all it holds. This callback averages the networks that the
module names, also where FSDP2 shards them, and not after skipped steps.
"""

import torch
from lightning.pytorch import LightningModule, Trainer

from callbacks.base import OptimizerStepCallback
from callbacks.skipped_steps import was_skipped
from switti.contracts import EMAModule
from switti.distributed.optimizer_state import local_shard


class ExponentialMovingAverage(OptimizerStepCallback):
    """Updates the copies that `ema_pairs()` of the module names, once per optimizer step that was not skipped.

    decay: weight of the EMA so far, in (0, 1). Early on it is min(decay, (1 + n)/(10 + n)) after n steps, so that
    the first, random weights are forgotten. The copies belong to the module, which saves and shards them.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay

    @torch.no_grad()
    def on_optimizer_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        if was_skipped(module):
            return
        assert isinstance(module, EMAModule)
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step))
        for ema, source in module.ema_pairs():
            averages = [local_shard(p) for p in ema.parameters()]
            sources = [local_shard(p) for p in source.parameters()]
            torch._foreach_lerp_(averages, sources, weight)
