"""Norms of every block's output, as in Figure 3."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.hooks import RemovableHandle


class ActivationNorms(Callback):
    """Logs mean and largest token norm of each block's output at every `every`-th optimiser step.

    Names: norms/block_<i>/mean, norms/block_<i>/max, and norms/last/… for the last block, which is what Figure 3
    shows. Norms are Euclidean, over the model's width, in float32; the largest is over all tokens of all ranks. Of
    accumulated batches the first one counts.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._norms: dict[int, tuple[Tensor, Tensor]] = {}
        self._handles: list[RemovableHandle] = []
        self._done_step = -1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if (step + 1) % self.every or step == self._done_step:
            return
        self._done_step = step
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
        if not self._norms or trainer.global_step == self._done_step:
            return  # while gradients accumulate: a value logged now would stand under the step before
        last = max(self._norms)
        means, largest = {}, {}
        for index, (mean, maximum) in self._norms.items():
            for name in [f"block_{index}"] + (["last"] if index == last else []):
                means[f"norms/{name}/mean"] = trainer.strategy.reduce(mean, reduce_op="mean")
                largest[f"norms/{name}/max"] = trainer.strategy.reduce(maximum, reduce_op="max")
        for logger in trainer.loggers:
            logger.log_metrics({k: float(v) for k, v in (means | largest).items()}, step=trainer.global_step)
        self._norms = {}
