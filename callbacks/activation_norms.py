"""Activation norms: token norms of every block's output, as in Figure 3."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from callbacks.base import OptimizerStepCallback, log_now
from switti.contracts import GeneratorTraining


class ActivationNorms(OptimizerStepCallback):
    """Logs mean and largest token norm of each block's output at every `every`-th optimizer step.

    Names: norms/block_<i>/mean, norms/block_<i>/max, and norms/last/… for the last block, which is what Figure 3
    shows. Norms are Euclidean, over the model's width, in float32; the largest is over all tokens of all ranks. With
    accumulation the first micro-batch of the step counts.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        # Of the step that is being made; once there are any, its further micro-batches are not looked at.
        self._norms: dict[int, tuple[Tensor, Tensor]] = {}
        self._handles: list[RemovableHandle] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if (trainer.global_step + 1) % self.every or self._norms:
            return
        assert isinstance(pl_module, GeneratorTraining) and pl_module.generator is not None
        blocks = pl_module.generator.blocks
        self._handles = [block.register_forward_hook(self._hook(i)) for i, block in enumerate(blocks)]

    def _hook(self, index: int) -> Any:
        def note(_module: torch.nn.Module, _inputs: Any, output: Tensor) -> None:
            norms = output.detach().float().norm(dim=-1)
            self._norms[index] = (norms.mean(), norms.max())

        return note

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        super().on_train_batch_end(trainer, pl_module, *args)

    def on_optimizer_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        if not self._norms:
            return
        last = max(self._norms)
        means, largest = {}, {}
        for index, (mean, maximum) in self._norms.items():
            for name in [f"block_{index}"] + (["last"] if index == last else []):
                means[f"norms/{name}/mean"] = trainer.strategy.reduce(mean, reduce_op="mean")
                largest[f"norms/{name}/max"] = trainer.strategy.reduce(maximum, reduce_op="max")
        log_now(trainer, means | largest)
        self._norms = {}
