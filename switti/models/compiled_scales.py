"""Compilation of sampling: one function of static shapes for each scale."""

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor


class CompiledScales:
    """`ScaleTransformer.forward_scale`, compiled for each scale at its first call.

    The shapes of a scale depend on the number of images and on whether it is guided; each such number is compiled once.
    torch.compile keeps its results with a function's code and stops after a few of them, so that every scale has a copy
    of the code.
    """

    def __init__(self, forward_scale: Callable[..., Tensor]) -> None:
        assert isinstance(forward_scale, MethodType)
        self.model, self.function = forward_scale.__self__, forward_scale.__func__
        self._compiled: dict[int, Callable[..., Tensor]] = {}

    def __call__(self, scale: int, *arguments: Any, **options: Any) -> Tensor:
        if scale not in self._compiled:
            original = self.function
            assert isinstance(original, FunctionType)
            code = original.__code__.replace(co_name=f"{original.__name__}_{scale}")
            copy = FunctionType(
                code, original.__globals__, code.co_name, original.__defaults__, original.__closure__
            )
            copy.__kwdefaults__ = original.__kwdefaults__
            self._compiled[scale] = torch.compile(copy, dynamic=False)
        return self._compiled[scale](self.model, scale, *arguments, **options)
