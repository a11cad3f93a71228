"""Optimiser steps whose loss or gradient is no finite number are left out, on all ranks alike.

Such a step still counts: its data are consumed, the schedule goes on, and so does `trainer.global_step`. But its
gradients are taken away before the optimiser sees them, and optimisers pass over parameters that have none: weights,
moments and their step counts stay as they are, bit for bit. Whoever keeps averages asks `skipped`.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


class NonfiniteGuard:
    """Attribute `nonfinite_guard` of a module that guards its steps; `skipped` tells how the last one went."""

    def __init__(self) -> None:
        self.skipped = False
        self._wrong: Tensor | None = None

    def watch(self, loss: Tensor) -> None:
        """Note the loss of a micro-batch; does not wait for the device."""
        wrong = ~loss.detach().isfinite().all()
        self._wrong = wrong if self._wrong is None else self._wrong | wrong

    def settle(self, values: Tensor, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether the step may be taken; if not, the gradients of `parameters` are gone. Call it once a step, on all
        ranks, when gradients have been accumulated and exchanged.

        values: what must be finite besides the losses watched, usually the norm of the gradients. One all-reduce of
        one number, and one wait for the device.
        """
        wrong = ~values.detach().isfinite().all()
        if self._wrong is not None:
            wrong, self._wrong = wrong | self._wrong, None
        flag = wrong.to(torch.int32)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        self.skipped = bool(flag.item())
        if self.skipped:
            for parameter in parameters:
                parameter.grad = None
        return not self.skipped
