"""A CUDA device that computes nothing: what would wait for it, or ask it for a value, fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Module = TypeVar("Module", bound=nn.Module)


class HostRoundTripError(AssertionError):
    """Values of the device went to the host."""


class _NothingToTheHost(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if "cuda" in devices and any(leaf.device.type == "cpu" for leaf in made):
            raise HostRoundTripError(str(func))
        return result


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Within it tensors on "cuda" have shapes and no values: a data-dependent shape, `.item()` or a copy to the host
    raises."""
    # Autograd looks for devices at its first backward pass in a process, and must not find the one that is feigned.
    torch.zeros((), requires_grad=True).backward()
    with FakeTensorMode(allow_non_fake_inputs=True), _NothingToTheHost():
        yield


def on_cuda(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """One of the same shape on the device."""
    chosen = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=chosen, device="cuda")


def move_to_cuda(module: Module, dtype: torch.dtype | None = None) -> Module:
    """The module with every parameter and buffer on the device."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                part._parameters[name] = nn.Parameter(on_cuda(parameter, dtype), parameter.requires_grad)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = on_cuda(buffer, None)
    return module
