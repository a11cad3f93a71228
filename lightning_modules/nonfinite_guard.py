"""Nonfinite guard: optimizer steps whose loss or gradient is not finite are skipped, on all ranks alike.

Such a step still counts: its data are consumed, and the schedule and `trainer.global_step` advance. But its gradients
are removed before the optimizer sees them, and optimizers ignore parameters that have none: weights, moments and their
step counts stay as they are, bit for bit. Callbacks that keep an EMA check `skipped`.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


class NonfiniteGuard:
    """Attribute `nonfinite_guard` of a module that guards its steps (`switti.contracts.GuardedModule`)."""

    def __init__(self) -> None:
        # Whether the last step was skipped.
        self.skipped = False
        self._nonfinite: Tensor | None = None

    def watch(self, loss: Tensor) -> None:
        """Note the loss of a micro-batch; does not wait for the device."""
        nonfinite = ~loss.detach().isfinite().all()
        self._nonfinite = nonfinite if self._nonfinite is None else self._nonfinite | nonfinite

    def settle(self, values: Tensor, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether the step may be taken; if not, the gradients of `parameters` are removed.

        Call it once a step, on all ranks, when gradients have been accumulated and reduced. It costs one all-reduce of
        one number, and one wait for the device. values: must be finite besides the losses watched, usually the norm of
        the gradients.
        """
        nonfinite = ~values.detach().isfinite().all()
        if self._nonfinite is not None:
            nonfinite, self._nonfinite = nonfinite | self._nonfinite, None
        flag = nonfinite.to(torch.int32)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        self.skipped = bool(flag.item())
        if self.skipped:
            for parameter in parameters:
                parameter.grad = None
        return not self.skipped
